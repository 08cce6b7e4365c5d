"""The Hugging Face hub: what of a run goes there, and how. The token comes from the environment or a login alone."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.report import ReportSettings
from ..errors import Lumina2Error, RunError, SettingError
from ..files import write_text
from ..run.checkpoint import newest_checkpoint
from ..run.events import CheckpointSaved, Ended, Event, Started
from ..run.folder import Run, RunStore
from .card import DIFFUSERS_FILE, card_pictures, file_card, model_card
from .courier import Courier, RefusedError, try_again
from .story import About, Story

WAITS_S = (2.0, 10.0, 30.0, 120.0)  # before each further try
CLOSING_S, CLOSING_EARLY_S = 1800.0, 20.0  # how long the end waits for what is under way
OUTBOX = ".outbox"  # in the run's folder: checkpoints that are not sent yet, out of reach of checkpoints_total_limit


def repo_name(settings: ReportSettings, run: Run) -> str:
    """``hub_model_id``, or the run's folder in letters that the hub allows."""
    return settings.hub_model_id or hub_name(run.folder)


def hub_name(folder: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_.]+", "-", folder)
    return re.sub(r"\.{2,}", ".", plain).strip("-.")[:96].strip("-.") or "lumina2"


def hub_problem(settings: ReportSettings) -> str | None:
    """Why nothing can be pushed, in a sentence; None where the hub knows the login and lets it write there."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "push_to_hub: HF_HUB_OFFLINE is set in the environment. Unset it, or set push_to_hub to false."
    if not huggingface_hub.get_token():
        return (
            "push_to_hub: nobody is logged in to the Hugging Face hub. Run `hf auth login` in a terminal, or set "
            "HF_TOKEN in ComfyUI's environment."
        )
    try:
        who = huggingface_hub.HfApi().whoami()
    except Exception as error:
        if status_of(error) in (401, 403):
            return "push_to_hub: the hub does not accept the token. Make a new one with write access: `hf auth login`."
        return f"push_to_hub: the hub cannot be reached ({reason(error)}). Check the network, or push later."
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return "push_to_hub: the token may only read. Make one with write access, and log in again: `hf auth login`."
    owner, _, name = settings.hub_model_id.rpartition("/")
    owners = [who.get("name"), *(each.get("name") for each in who.get("orgs", ()))]
    if owner and owner not in owners:
        known = ", ".join(filter(None, owners))
        return f"hub_model_id: the login may not write to {owner}/{name}. Choose an owner among {known}."
    return None


def push(
    files: Mapping[str, Path],
    repo_id: str,
    private: bool = True,
    message: str = "Upload",
    say: Callable[[str], None] = lambda _: None,
    waits: Sequence[float] | None = None,
) -> str:
    """Put files into a repository, which is made where there is none, in one commit.

    Args:
        files: by their path in the repository.
        private: of a new repository.

    Returns:
        Its web address.

    Raises:
        RunError: the hub did not take them; nothing was changed there.
    """

    def wait(seconds: float) -> bool:
        say(f"the hub did not answer; trying again in {seconds:.0f} s")
        time.sleep(seconds)
        return True

    try:
        return try_again(lambda: _commit(files, repo_id, private, message, say), waits or WAITS_S, wait)
    except Exception as error:
        raise RunError(
            f"{repo_id} was not pushed: {reason(error)}. The files are unharmed; push again later."
        ) from None


def run_files(story: Story, store: RunStore) -> dict[str, Path]:
    """What goes to the hub when a run is over, by the path in the repository.

    Raises:
        RunError: the trained file is not there.
    """
    trained = store.file(story.run.folder, story.full)
    if not trained.exists():
        raise RunError(f"{trained} is not there. Queue the training again: it is written anew from its checkpoint.")
    averaged = trained.with_stem(f"{trained.stem}-ema")
    found = {trained.name: trained, averaged.name: averaged, **unsent(story.folder)}
    found |= {path: story.folder / path for path in ("README.md", DIFFUSERS_FILE, *card_pictures(story))}
    return {path: file for path, file in found.items() if file.exists()}


def unsent(folder: Path) -> dict[str, Path]:
    """Checkpoints of a run that the hub has not got yet, by their path in the repository."""
    return {f"checkpoints/{file.name}": file for file in sorted((folder / OUTBOX).glob("*.safetensors"))}


def sent(files: Iterable[Path]) -> None:
    """Empty the outbox of what was pushed."""
    for file in files:
        if file.parent.name == OUTBOX:
            file.unlink(missing_ok=True)
            if not any(file.parent.iterdir()):
                file.parent.rmdir()


def write_for_diffusers(story: Story, store: RunStore) -> None:
    """The run's LoRA as diffusers reads it, into the run's folder; nothing where it has no such form."""
    from ..adapter.formats.read import read_adapters
    from ..adapter.formats.write import write_adapters

    file, trained = story.folder / DIFFUSERS_FILE, store.file(story.run.folder, story.full)
    file.unlink(missing_ok=True)
    if not story.full and trained.exists():
        try:
            write_adapters(file, read_adapters(trained), "diffusers")
        except Lumina2Error:
            file.unlink(missing_ok=True)  # some kinds of LyCORIS: the card says so


def write_card(story: Story, about: About, settings: ReportSettings, store: RunStore, repo: str = "") -> None:
    """README.md in the run's folder."""
    newest = newest_checkpoint(story.folder)
    trained = store.file(story.run.folder, story.full)
    weights = trained if trained.exists() or newest is None else newest.lora
    card = model_card(story, about, settings, repo or repo_name(settings, story.run), weights)
    write_text(story.folder / "README.md", card)


def push_run(
    store: RunStore,
    run: Run,
    settings: ReportSettings,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """Push a run that is over, with its card written anew; the repository's web address.

    Raises:
        RunError: the trained file is not there, or the hub did not take it.
    """
    story = Story.read(run, store.path(run))
    write_for_diffusers(story, store)
    write_card(story, About.read(story.folder), settings, store)
    files, repo = run_files(story, store), repo_name(settings, run)
    url = push(files, repo, settings.model_card_private, f"{story.step} steps", say)
    sent(files.values())
    return url


def push_file(path: Path, repo_id: str, private: bool, note: str, say: Callable[[str], None], folder: Path) -> str:
    """Push a LoRA that is no run's, with a card of what its own file tells.

    Args:
        folder: where the card is written first.

    Raises:
        RunError: as ``push``.
    """
    card = folder / "README.md"
    write_text(card, file_card(path, note))
    return push({path.name: path, "README.md": card}, repo_id, private, f"Upload {path.name}", say)


@dataclass(frozen=True)
class _Parcel:
    files: Mapping[str, Path]
    what: str


class HubListener:
    """Listens, and pushes checkpoints and the end; what the hub did not take goes along with the next push."""

    def __init__(self, settings: ReportSettings, store: RunStore, story: Story, say: Callable[[str], None]) -> None:
        self.settings, self.store, self.story, self.say = settings, store, story, say
        self.repo = repo_name(settings, story.run)
        self._courier = Courier[_Parcel]("hub", self._deliver, self._failed, WAITS_S)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started) and unsent(self.story.folder):
            self._send({}, f"up to step {event.step}")
        elif isinstance(event, CheckpointSaved) and self.settings.push_checkpoints_to_hub:
            self._checkpoint(event)
        elif isinstance(event, Ended):
            self._end(event)

    def _checkpoint(self, event: CheckpointSaved) -> None:
        weights = event.path / "lora.safetensors"
        if not weights.exists():
            raise SettingError(
                "push_checkpoints_to_hub: checkpoints of a full fine-tune are not pushed, only the model at the end"
            )
        kept = self.story.folder / OUTBOX / f"{self.story.run.folder}-{event.step}.safetensors"
        kept.parent.mkdir(exist_ok=True)
        kept.unlink(missing_ok=True)
        try:
            os.link(weights, kept)
        except OSError:  # no such links on this disk
            shutil.copyfile(weights, kept)
        shown = {path: self.story.folder / path for path in ("README.md", *card_pictures(self.story))}
        self._send(shown, f"step {event.step}")

    def _end(self, event: Ended) -> None:
        over = event.status in ("finished", "stopped")
        try:
            if over and self.settings.push_to_hub:
                self._send(run_files(self.story, self.store), f"{event.step} steps")
            elif unsent(self.story.folder):
                self._send({}, f"up to step {event.step}")
        finally:
            if not self._courier.close(CLOSING_S if over else CLOSING_EARLY_S):
                self.say(f"The push to {self.repo} was not over in time. Push the run again with Push to Hub.")

    def _send(self, files: Mapping[str, Path], what: str) -> None:
        self._courier.add(_Parcel(files, what))
        if not self.settings.push_to_hub_background:
            self._courier.wait(CLOSING_S)

    def _deliver(self, parcel: _Parcel) -> None:
        wanted = {**parcel.files, **unsent(self.story.folder)}
        files = {path: file for path, file in wanted.items() if file.exists()}
        if files:
            _commit(files, self.repo, self.settings.model_card_private, parcel.what, self.say)
            sent(files.values())

    def _failed(self, parcel: _Parcel, error: Exception) -> None:
        self.say(
            f"{self.repo} did not get “{parcel.what}”: {reason(error)}. Nothing is lost: the files are in "
            f"{self.story.folder}, and the next push or Push to Hub takes them along."
        )


def _commit(files: Mapping[str, Path], repo: str, private: bool, message: str, say: Callable[[str], None]) -> str:
    """Raises RefusedError where another try would not help."""
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import HFValidationError

    if not huggingface_hub.get_token():
        raise RefusedError("nobody is logged in to the hub; run `hf auth login`")
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            say(f"{url.repo_id} is public on the hub already, and stays so; model_card_private is for new ones.")
        adds = [CommitOperationAdd(path, str(file)) for path, file in files.items()]
        api.create_commit(url.repo_id, adds, commit_message=message)
    except HFValidationError:
        raise RefusedError(f"{repo!r} is no name that the hub allows") from None
    except Exception as error:
        status = status_of(error)
        if status is not None and 400 <= status < 500 and status not in (408, 409, 412, 423, 429):
            raise RefusedError(reason(error)) from None
        raise
    return str(url)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error tells of."""
    found: Any = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def reason(error: BaseException) -> str:
    """What an error says, on one line; of an answer from the hub without the headers and address that came with it."""
    status, said = status_of(error), getattr(error, "server_message", None)
    if status is not None:
        meant = {401: "the token is not accepted", 403: "the token may not write there", 404: "there is no such place"}
        return f"{said or meant.get(status, 'it answered with an error')} (HTTP {status})"
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, (RefusedError, OSError, Lumina2Error)) else type(error).__name__
    return ": ".join(filter(None, (kind, text[:200]))) or type(error).__name__
