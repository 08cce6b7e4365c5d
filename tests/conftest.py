"""A real ComfyUI with the plugin in it."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "comfy")]

from comfy_server import Server  # noqa: E402


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Starts servers, each over a base folder of its own; all are stopped at the end."""
    started = []

    def start():
        base = tmp_path_factory.mktemp("comfy") / "base"
        started.append(Server(Path(sys.executable), Path(os.environ["COMFYUI_PATH"]), base))
        started[-1].start()
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def server(start):
    """One server for all tests that do not ask for their own."""
    return start()
