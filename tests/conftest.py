"""A real ComfyUI with the plugin in it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "comfy")]

from comfy_server import Server  # noqa: E402

# Beside the project in its folder: large, and nothing that git would take in.
NOT_OURS = (".git", ".venv", ".comfyui", ".hypothesis", ".*_cache", "__pycache__")


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


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """The plugin as the registry hands it out: validated and packed by comfy-cli, then unpacked.

    Returns:
        The folder that it was unpacked into, the zip file, and all that comfy-cli said.
    """
    copy, home = tmp_path_factory.mktemp("copy") / "plugin", tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_OURS))
    for command in (["init", "-q"], ["add", "-A"]):  # comfy-cli packs what git knows
        subprocess.run(["git", *command], cwd=copy, check=True)
    comfy = Path(sys.executable).with_name("comfy" + Path(sys.executable).suffix)
    variables = {**os.environ, "HOME": str(home), "USERPROFILE": str(home), "DO_NOT_TRACK": "1"}
    said = ""
    for command in ("validate", "pack"):
        answer = subprocess.run(
            [comfy, "--skip-prompt", "node", command],
            cwd=copy,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        said += answer.stdout + answer.stderr
        assert answer.returncode == 0, said
    unpacked = tmp_path_factory.mktemp("custom_nodes") / "lumina2-trainer"
    with zipfile.ZipFile(copy / "node.zip") as zipped:
        zipped.extractall(unpacked)
    return unpacked, copy / "node.zip", said
