"""Webhooks: Discord, and raw JSON in the shape of SimpleTuner's, sent by a thread while the training goes on."""

from __future__ import annotations

import base64
import json
import ssl
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..config.report import LOG_LEVELS, WebhookSettings
from ..run.events import CheckpointSaved, Ended, Evaluated, Event, Paused, Resumed, Said, Started, StepDone, Validated
from ..run.folder import Run
from .courier import Courier, RefusedError
from .trackers import step_values

WAITS_S = (2.0, 10.0)
TIMEOUT_S, CLOSING_S = 10.0, 20.0
MOST_WAITING = 100
DISCORD_PICTURES, DISCORD_LETTERS = 10, 2000  # in one message


@dataclass(frozen=True)
class Message:
    """What one event is to somebody who is told of it."""

    level: str
    text: str
    data: dict[str, Any]  # SimpleTuner's shape for this kind of event
    pictures: tuple[Path, ...] = ()


class WebhookListener:
    """Listens, and tells one address. A failure is said once, and tried again with the next event."""

    def __init__(
        self, settings: WebhookSettings, interval_s: int | None, run: Run, folder: Path, say: Callable[[str], None]
    ) -> None:
        self.settings, self.interval_s, self.run, self.folder, self.say = settings, interval_s, run, folder, say
        self._told_at, self._complained = 0.0, False
        name = f"webhook {settings.webhook_type}"
        self._courier = Courier[Message](name, self._deliver, self._failed, WAITS_S, MOST_WAITING)

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone):
            now = time.monotonic()
            if self.interval_s is None or self.settings.webhook_type != "raw" or now < self._told_at + self.interval_s:
                return
            self._told_at = now
        message = message_of(event, self.run, self.folder)
        if message and LOG_LEVELS.index(message.level) <= LOG_LEVELS.index(self.settings.log_level):
            self._courier.add(message)
        if isinstance(event, Ended):
            self._courier.close(CLOSING_S)

    def _deliver(self, message: Message) -> None:
        _post(request_of(message, self.settings, self.run.folder), self.settings.ssl_no_verify)

    def _failed(self, message: Message, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            # The address itself stays out of it: whoever reads the log could write there.
            self.say(f"The {self.settings.webhook_type} webhook at {self.settings.host} was not told: {_why(error)}.")


def message_of(event: Event, run: Run, folder: Path) -> Message | None:
    """What is told of an event; None: nothing."""
    if isinstance(event, Started):
        text = f"{run.folder}: training begins" if not event.step else f"{run.folder}: going on from step {event.step}"
        return Message("info", text, _status("running", event.step, run, text, run.settings))
    if isinstance(event, StepDone):
        text = f"{run.folder}: step {event.step} of {run.target}"
        return Message("info", text, _status("running", event.step, run, text, step_values(event)))
    if isinstance(event, CheckpointSaved):
        text = f"{run.folder}: checkpoint of step {event.step}"
        checkpoint = {"path": event.path.as_posix(), "label": text, "is_final": event.step >= run.target}
        return Message("info", text, {"type": "training.checkpoint", "title": text, "checkpoint": checkpoint})
    if isinstance(event, Validated):
        names = ", ".join(dict.fromkeys(sample.name for sample in event.samples if sample.name))
        text = f"{run.folder}: samples of step {event.step}" + (f": {names}" if names else "")
        pictures = tuple(folder / sample.path for sample in event.samples)
        data = {"step": event.step, "scores": event.scores, "prompts": [sample.prompt for sample in event.samples]}
        return Message("info", text, _notification(text, "info", data), pictures)
    if isinstance(event, Evaluated):
        text = f"{run.folder}: held-out loss {event.loss:.4g} at step {event.step}"
        return Message("info", text, _notification(text, "info", {"step": event.step, "loss": event.loss}))
    if isinstance(event, (Paused, Resumed)):
        text = f"{run.folder}: {'paused' if isinstance(event, Paused) else 'going on'} at step {event.step}"
        return Message("info", text, _notification(text, "info", {"step": event.step}))
    if isinstance(event, Said):
        return Message("debug", event.text, _notification(event.text, "debug", {}))
    if isinstance(event, Ended):
        level = {"failed": "error", "interrupted": "warning"}.get(event.status, "info")
        text = f"{run.folder}: {event.status} at step {event.step}" + (f". {event.message}" if event.message else "")
        status = {"finished": "completed", "stopped": "completed"}.get(event.status, event.status)
        return Message(level, text, _status(status, event.step, run, text, {"seconds": event.seconds}))
    return None


def request_of(message: Message, settings: WebhookSettings, job: str) -> urllib.request.Request:
    prefix = f"`({settings.message_prefix or job})` "
    if settings.webhook_type == "discord":
        body, kind = _discord(prefix + message.text, message.pictures)
    else:
        content = {
            "severity": message.level,
            "job_id": job,
            "timestamp": datetime.now(tz=timezone.utc).isoformat(),
            **message.data,
        }
        pictures = [base64.b64encode(each).decode() for each in _contents(message.pictures)]
        told = json.loads(json.dumps(content), parse_constant=lambda _: None)  # JSON knows no NaN
        body, kind = json.dumps({**told, "images": pictures} if pictures else told).encode(), "application/json"
    headers = {"Content-Type": kind, "User-Agent": "Lumina2-Trainer"}
    if settings.auth_token:
        headers["X-API-Key"] = settings.auth_token
    return urllib.request.Request(settings.url, body, headers, method="POST")


def _status(status: str, step: int, run: Run, text: str, metrics: dict[str, Any]) -> dict[str, Any]:
    progress = {"current": step, "total": run.target, "percent": round(100 * step / max(run.target, 1), 2)}
    return {
        "type": "training.status",
        "title": status.title(),
        "message": text,
        "data": {"status": status},
        "progress": {**progress, "metrics": metrics},
    }


def _notification(text: str, level: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"type": "notification", "severity": level, "title": text.splitlines()[0], "message": text, "data": data}


def _discord(text: str, pictures: Sequence[Path]) -> tuple[bytes, str]:
    """A message with its pictures as a form, as Discord's API wants it, and its content type."""
    content = {"content": text[:DISCORD_LETTERS], "allowed_mentions": {"parse": []}}
    boundary = uuid.uuid4().hex
    parts = [(b'name="payload_json"', b"application/json", json.dumps(content).encode())]
    for number, picture in enumerate(_contents(pictures[:DISCORD_PICTURES])):
        parts.append((f'name="files[{number}]"; filename="{number}.png"'.encode(), b"image/png", picture))
    body = b"".join(
        b"--%b\r\nContent-Disposition: form-data; %b\r\nContent-Type: %b\r\n\r\n%b\r\n" % (boundary.encode(), *part)
        for part in parts
    )
    return body + b"--%b--\r\n" % boundary.encode(), f"multipart/form-data; boundary={boundary}"


def _contents(pictures: Sequence[Path]) -> list[bytes]:
    return [picture.read_bytes() for picture in pictures if picture.exists()]


def _post(request: urllib.request.Request, insecure: bool) -> None:
    """Raises RefusedError where the address itself is wrong or does not want it."""
    context = ssl._create_unverified_context() if insecure else None
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code not in (408, 429):
            raise RefusedError(f"it answered with HTTP {error.code}") from None
        raise


def _why(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"it answered with HTTP {error.code}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) if isinstance(error, (RefusedError, OSError)) else type(error).__name__
