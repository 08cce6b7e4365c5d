"""What a page would hear of a server."""

import asyncio
import json
import threading

from aiohttp import ClientSession

LIMIT_S = 120


class Page:
    """What a browser hears of a server, as far as it is JSON."""

    def __init__(self, url):
        self.url, self.messages, self.changed, self.open = url, [], threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._listen()), daemon=True)

    def __enter__(self):
        self._thread.start()
        assert self.open.wait(LIMIT_S)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)

    async def _listen(self):
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        try:
            async with ClientSession() as session, session.ws_connect(f"{self.url}/ws?clientId=test") as socket:
                self.open.set()
                async for message in socket:
                    if isinstance(message.data, str):
                        with self.changed:
                            self.messages.append(json.loads(message.data))
                            self.changed.notify_all()
        except asyncio.CancelledError:
            pass

    def wait(self, true):
        """The first message, from now or earlier, that ``true`` holds for."""
        with self.changed:
            assert self.changed.wait_for(lambda: any(map(true, self.messages)), LIMIT_S), "it did not come to that"
            return next(filter(true, self.messages))

    def count(self, true):
        with self.changed:
            return sum(map(true, self.messages))
