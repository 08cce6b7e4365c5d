"""Everything that listens to a run on somebody else's behalf, as one listener whose own troubles never end the run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from ..config.report import ReportSettings
from ..run.events import Between, CheckpointSaved, Ended, Event, Listener, Started, Validated
from ..run.folder import RunStore
from .hub import HubListener, reason, write_card, write_for_diffusers
from .page import PageListener
from .story import About, Story
from .trackers import Tracking, packaged
from .webhooks import WebhookListener


class _Part(NamedTuple):
    name: str
    listen: Listener


def reporters(
    settings: ReportSettings,
    store: RunStore,
    say: Callable[[str], None],
    about: About | None = None,
) -> Listener:
    """What a run is given to tell trackers, the page, the card, the hub and webhooks.

    It stands behind the run's journal, which writes ``events.jsonl``. The card is written whatever the settings are.

    Args:
        say: takes a sentence for the user, on the run's own thread; what it raises is the caller's.
        about: what the run's files do not tell, for the card; None: what was told of the run before.
    """
    return _Reporters(settings, store, say, about)


class _Reporters:
    def __init__(
        self,
        settings: ReportSettings,
        store: RunStore,
        say: Callable[[str], None],
        about: About | None,
    ) -> None:
        self.settings, self.store, self.say, self.about = settings, store, say, about
        self.story: Story | None = None
        self._parts: list[_Part] = []
        self._sentences: list[str] = []
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Between):
            if isinstance(event, Started):
                self._begin(event)
            if self.story:
                self.story.add(event)
            for part in self._parts:
                self._tell(part, event)
            if isinstance(event, Ended):
                self._parts = []
        self._flush()

    def _begin(self, event: Started) -> None:
        folder = self.store.path(event.run)
        folder.mkdir(parents=True, exist_ok=True)
        story = self.story = Story.read(event.run, folder)
        about = self.about or About.read(folder)
        if self.about:
            self.about.keep(folder)
        settings = self.settings
        self._parts = [_Part(name, Tracking(name, settings, folder)) for name in packaged(settings)]
        self._parts.append(_Part("the model card", self._card(story, about)))
        if "simpletuner" in settings.trackers:
            self._parts.append(_Part("the page", PageListener(story, about)))
        if settings.pushes:
            self._parts.append(_Part("the hub", HubListener(settings, self.store, story, self._collect)))
        self._tell(_Part("webhooks", self._add_webhooks), event)

    def _add_webhooks(self, event: Event) -> None:
        assert self.story
        for each in self.settings.webhooks():
            interval = self.settings.webhook_reporting_interval
            listener = WebhookListener(each, interval, self.story.run, self.story.folder, self._collect)
            self._parts.append(_Part(f"the {each.webhook_type} webhook", listener))

    def _card(self, story: Story, about: About) -> Listener:
        def listen(event: Event) -> None:
            if isinstance(event, Ended) and self.settings.push_to_hub:
                write_for_diffusers(story, self.store)
            if isinstance(event, (CheckpointSaved, Validated, Ended)):
                write_card(story, about, self.settings, self.store)

        return listen

    def _tell(self, part: _Part, event: Event) -> None:
        try:
            part.listen(event)
        except Exception as error:  # a tracker's trouble is not the run's
            why = reason(error).rstrip(".")
            self._collect(f"{part.name} was not told of everything: {why}. The training goes on without it.")

    def _collect(self, sentence: str) -> None:
        """From any thread; each sentence is said once."""
        with self._lock:
            if sentence not in self._said:
                self._said.add(sentence)
                self._sentences.append(sentence)

    def _flush(self) -> None:
        with self._lock:
            sentences, self._sentences = self._sentences, []
        for sentence in sentences:
            self.say(sentence)
