"""Where a training is told of: trackers, the Hugging Face hub, webhooks. Nothing of it decides any weight.

The names are SimpleTuner's. Tokens are no settings: they come from the environment or from a login.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import SettingError
from .checks import one_of, require

TRACKERS = ("simpletuner", "tensorboard", "wandb")
LOG_LEVELS = ("critical", "error", "warning", "info", "debug")
WEBHOOK_TYPES = ("discord", "raw")
_REPO = re.compile(r"(?:[A-Za-z0-9][\w.\-]*/)?[A-Za-z0-9_][\w.\-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class WebhookSettings:
    """One address that is told of a training. Whoever knows the address can write to it: it is never shown."""

    webhook_type: str
    url: str = field(repr=False)
    message_prefix: str = ""  # empty: the run's name
    log_level: str = "info"
    auth_token: str = field(default="", repr=False)  # sent as X-API-Key
    ssl_no_verify: bool = False

    def __post_init__(self) -> None:
        one_of("webhook_type", self.webhook_type, WEBHOOK_TYPES)
        one_of("log_level", self.log_level, LOG_LEVELS)
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            key = "webhook_url" if self.webhook_type == "discord" else "callback_url"
            raise SettingError(f"webhook_config: {key} is no web address. Write one that begins with https://.")

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""


@dataclass(frozen=True)
class ReportSettings:
    """Who is told of a training.

    Raises:
        SettingError: a value is not possible.
    """

    report_to: str | tuple[str, ...] | list[str] = "none"  # simpletuner (a page in the run's folder), tensorboard, …
    tracker_project_name: str = "lumina2-training"
    tracker_run_name: str = ""  # empty: the run's folder
    logging_dir: str = ""  # of tensorboard; empty: the run's own folder
    push_to_hub: bool = False  # when the training ends
    push_checkpoints_to_hub: bool = False
    push_to_hub_background: bool = True  # False: the training waits for each push
    hub_model_id: str = ""  # empty: the run's folder
    model_card_private: bool = True  # the repository is made so that nobody else sees it
    model_card_note: str = ""
    model_card_safe_for_work: bool = True  # False: the card is marked as not for all audiences
    webhook_config: str | Mapping[str, Any] | list[Any] | tuple[Any, ...] | None = None  # or a JSON file's path
    webhook_reporting_interval: int | None = None  # seconds between tellings of the loss to raw webhooks; None: never

    def __post_init__(self) -> None:
        for name in self.named:
            one_of("report_to", name, (*TRACKERS, "all", "none"))
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(each.default, bool):
                require(isinstance(value, bool), each.name, value, "choose true or false")
            elif isinstance(each.default, str) and each.name != "report_to":
                require(isinstance(value, str), each.name, value, "write a text")
        require(bool(self.tracker_project_name.strip()), "tracker_project_name", "", "write a name")
        fits = _REPO.fullmatch(self.hub_model_id) and not re.search(r"--|\.\.|[.-]$", self.hub_model_id)
        require(
            not self.hub_model_id or bool(fits),
            "hub_model_id",
            self.hub_model_id,
            "write name or owner/name in letters, digits and -_.",
        )
        interval = self.webhook_reporting_interval
        require(
            interval is None or (isinstance(interval, int) and interval >= 1),
            "webhook_reporting_interval",
            interval,
            "choose at least 1 second, or none at all",
        )
        if self.webhook_config and not self._webhook_file:
            self.webhooks()

    @property
    def named(self) -> tuple[str, ...]:
        """``report_to`` as a list."""
        names = self.report_to.split(",") if isinstance(self.report_to, str) else self.report_to
        stripped = (str(name).strip().lower() for name in names)
        return tuple("simpletuner" if name == "local" else name for name in stripped if name)

    @property
    def trackers(self) -> tuple[str, ...]:
        """Those of ``TRACKERS`` that are wanted."""
        return TRACKERS if "all" in self.named else tuple(name for name in TRACKERS if name in self.named)

    @property
    def pushes(self) -> bool:
        return self.push_to_hub or self.push_checkpoints_to_hub

    @property
    def _webhook_file(self) -> str:
        """The path of a file with the webhooks; empty where they stand in the setting itself."""
        given = self.webhook_config
        return given.strip() if isinstance(given, str) and not given.lstrip().startswith(("{", "[")) else ""

    def webhooks(self) -> tuple[WebhookSettings, ...]:
        """All addresses that are told; ``{env:NAME}`` in a text stands for a variable of the environment.

        Raises:
            SettingError: the file cannot be read, or an entry is not possible. No address is part of the sentence.
        """
        given: Any = self.webhook_config
        where = f"webhook_config {self._webhook_file}" if self._webhook_file else "webhook_config"
        try:
            if self._webhook_file:
                given = Path(self._webhook_file).expanduser().read_text(encoding="utf-8")
            if isinstance(given, str):
                given = json.loads(given) if given.strip() else []
        except OSError as error:
            raise SettingError(f"{where} cannot be read ({error.strerror}). Name a JSON file that is there.") from None
        except ValueError:
            raise SettingError(f"{where} is no JSON; write {_EXAMPLE}.") from None
        entries = given if isinstance(given, (list, tuple)) else [given] if given else []
        return tuple(_webhook(entry, where) for entry in entries)

    def public(self) -> dict[str, Any]:
        """Every setting by name, less what gives access to something: fit to be written into files."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        if self.webhook_config and not self._webhook_file:
            values["webhook_config"] = [{"webhook_type": each.webhook_type} for each in self.webhooks()]
        return values


_EXAMPLE = (
    '{"webhook_type": "discord", "webhook_url": "https://…"} or {"webhook_type": "raw", "callback_url": "https://…"}'
)


def _webhook(entry: Any, where: str) -> WebhookSettings:
    if not isinstance(entry, Mapping):
        raise SettingError(f"{where}: each entry is an object like {_EXAMPLE}.")
    values = {key: _from_environment(value, f"{where}, {key}") for key, value in entry.items()}
    insecure = values.get("ssl_no_verify", False)
    return WebhookSettings(
        webhook_type=str(values.get("webhook_type", "")),
        url=str(values.get("webhook_url") or values.get("callback_url") or ""),
        message_prefix=str(values.get("message_prefix") or ""),
        log_level=str(values.get("log_level") or "info").lower(),
        auth_token=str(values.get("auth_token") or ""),
        ssl_no_verify=insecure is True or str(insecure).lower() == "true",
    )


def _from_environment(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value

    def known(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            raise SettingError(f"{where} names the environment variable {name}, which is not set. Set it, and restart.")
        return os.environ[name]

    return re.sub(r"\{env:(\w+)\}", known, value)
