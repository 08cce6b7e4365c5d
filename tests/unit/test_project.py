"""The project as a whole: what imports what, and the environment that setup makes."""

import ast
import http.server
import importlib.metadata
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    path
    for path in (ROOT / "scripts").iterdir()
    if path.name in {"environment.py", "comfy_server.py", "setup", "test", "demo"}
]
HEAVY = {"accelerate", "datasets", "diffusers", "lycoris", "peft", "transformers"}


def requirements(path: Path) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def imports(node: ast.AST) -> set[str]:
    """The top-level packages that a module or a statement imports, relative ones left out."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            names |= {alias.name.split(".")[0] for alias in part.names}
        elif isinstance(part, ast.ImportFrom) and part.level == 0:
            names.add(part.module.split(".")[0])
    return names


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="versions are pinned for Python 3.11")
def test_everything_installed_is_pinned():
    pins = {canonicalize_name(pin.name): pin.specifier for pin in requirements(environment.LOCK_FILE)}
    installed = {canonicalize_name(found.name): found.version for found in importlib.metadata.distributions()}
    assert {name: version for name, version in installed.items() if name not in pins and name != "pip"} == {}
    assert {name: version for name, version in installed.items() if name in pins and version not in pins[name]} == {}


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    program = Path(sys.executable).with_name("lint-imports" + Path(sys.executable).suffix)
    return subprocess.run([program, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)


def test_imports_go_one_way():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("model", "import comfy.sd", "The engine knows nothing of ComfyUI"),
        ("run", "import folder_paths", "The engine knows nothing of ComfyUI"),
        ("data", "from .. import model", "sample and report hang off run"),
        ("run", "from ..sample import sampler", "sample and report hang off run"),
        ("errors", "from . import files", "sample and report hang off run"),
    ],
)
def test_imports_the_other_way_are_noticed(tmp_path, module, line, contract):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("__init__.py", "data/__init__.py", "model/__init__.py", "run/__init__.py", "sample/__init__.py"):
        file = tmp_path / "training" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for name in ("errors.py", "files.py", "sample/sampler.py"):
        (tmp_path / "training" / name).touch()
    package = tmp_path / "training" / module
    (package / "bad.py" if package.is_dir() else package.with_suffix(".py")).write_text(line + "\n")
    result = lint_imports(tmp_path)
    broken = [part for part in " ".join(result.stdout.split()).split(" KEPT ") if "BROKEN" in part]
    assert result.returncode != 0
    assert any(f"{contract} BROKEN" in part for part in broken), result.stdout + result.stderr


def test_the_engine_stays_within_itself():
    """``from ...nodes import bridge`` leads out of the engine once the plugin is a package; no linter follows it."""
    leaving = {
        f"{path.relative_to(ROOT)}:{part.lineno}"
        for path in (ROOT / "training").rglob("*.py")
        for part in ast.walk(parse(path))
        if isinstance(part, ast.ImportFrom) and part.level >= len(path.relative_to(ROOT).parts)
    }
    assert leaving == set()


@pytest.mark.parametrize("folder", ["training", "nodes"])
def test_heavy_libraries_are_imported_where_they_are_used(folder):
    eager = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / folder).rglob("*.py")
        for statement in parse(path).body
        if isinstance(statement, ast.Import | ast.ImportFrom)
        for name in imports(statement) & HEAVY
    }
    assert eager == set()


def test_only_the_command_line_imports_diffusers():
    """It is none of the plugin's requirements: ComfyUI-Manager would bring a huggingface_hub that breaks ComfyUI."""
    paths = [path for folder in ("training", "nodes") for path in (ROOT / folder).rglob("*.py")]
    importing = {path.parent.relative_to(ROOT).as_posix() for path in paths if "diffusers" in imports(parse(path))}
    assert importing == {"training/command"}


def test_tests_are_no_package():
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_run_before_anything_is_installed(path):
    assert imports(parse(path)) - sys.stdlib_module_names <= {"environment", "comfy_server"}


PYTHON = environment.Interpreter(("python3.11",), "3.11.7")


def test_another_lock_python_or_comfyui_is_another_environment(tmp_path):
    lock = tmp_path / "lock.txt"
    lock.write_bytes(b"torch==1\n")
    key = environment.environment_key(PYTHON, b"0.3.75", [lock])
    assert environment.environment_key(PYTHON, b"0.3.75", [lock]) == key
    assert environment.environment_key(environment.Interpreter(PYTHON.command, "3.11.8"), b"0.3.75", [lock]) != key
    assert environment.environment_key(PYTHON, b"0.28.0", [lock]) != key
    lock.write_bytes(b"torch==1\r\n")
    assert environment.environment_key(PYTHON, b"0.3.75", [lock]) == key, "line ends of Windows are the same lock"
    lock.write_bytes(b"torch==2\n")
    assert environment.environment_key(PYTHON, b"0.3.75", [lock]) != key


def test_an_interrupted_setup_is_done_again_from_nothing(tmp_path):
    folder, builds = tmp_path / "environment", []

    def build(folder: Path) -> None:
        folder.mkdir()
        (folder / "python").touch()
        builds.append(folder)
        if len(builds) == 1:
            raise KeyboardInterrupt
        (folder / "finished").touch()

    with pytest.raises(KeyboardInterrupt):
        environment.build_once(folder, "python", build)
    assert folder.exists()
    assert not environment.is_complete(folder, "python")
    (folder / "left over").touch()

    environment.build_once(folder, "python", build)
    assert environment.is_complete(folder, "python")
    assert (folder / "finished").exists()
    assert not (folder / "left over").exists()

    environment.build_once(folder, "python", build)
    assert len(builds) == 2, "what is complete is left alone"

    (folder / "python").unlink()
    environment.build_once(folder, "python", build)
    assert len(builds) == 3, "an environment without its Python is made again"


def test_environments_unused_for_a_month_are_removed(tmp_path):
    for name, days in (("kept", 99), ("old", 31), ("used", 29), ("broken", 31)):
        (tmp_path / name).mkdir()
        used = environment.time.time() - days * 86400
        if name != "broken":
            (tmp_path / name / environment.COMPLETE).touch()
            os.utime(tmp_path / name / environment.COMPLETE, (used, used))
        os.utime(tmp_path / name, (used, used))
    environment.remove_unused(tmp_path, keep=tmp_path / "kept")
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "used"}


def test_two_setups_take_turns(tmp_path):
    with environment.locked(tmp_path / "lock"), open(tmp_path / "lock", "a+") as other:
        assert not environment.try_lock(other.fileno())
    with open(tmp_path / "lock", "a+") as other:
        assert environment.try_lock(other.fileno())


def test_links_follow_the_environment_and_spare_what_others_made(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        environment.link(tmp_path / "link", tmp_path / name)
        assert environment.leads_to(tmp_path / "link", tmp_path / name)
    (tmp_path / "second").rmdir()
    environment.link(tmp_path / "link", tmp_path / "first")
    assert environment.leads_to(tmp_path / "link", tmp_path / "first"), "a link that leads nowhere is replaced"

    (tmp_path / "own").mkdir()
    with pytest.raises(environment.SetupError, match="was not made by setup"):
        environment.link(tmp_path / "own", tmp_path / "first")


def test_a_comfyui_of_the_users_own_is_looked_at_first(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(environment.SetupError, match=r"no main\.py"):
        environment.foreign_comfyui(tmp_path)
    for name in ("main.py", "comfy", "requirements.txt"):
        (tmp_path / name).touch()
    assert environment.foreign_comfyui(tmp_path) == tmp_path.resolve()
    monkeypatch.setenv("COMFYUI_PATH", str(environment.own_comfyui(tmp_path)))
    assert environment.foreign_comfyui(tmp_path) is None, "the project's own is not foreign"


def test_sound_is_not_needed():
    text = "torch\ntorchaudio\naiohttp>=3.11.8\n\n#non essential dependencies:\nkornia>=0.7.1 # filters\n"
    assert environment.comfyui_needs(text, sound=False) == ["torch", "aiohttp>=3.11.8", "kornia>=0.7.1"]
    assert "torchaudio" in environment.comfyui_needs(text, sound=True)


def test_a_python_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LUMINA2_PYTHON", str(tmp_path / "python"))
    with pytest.raises(environment.SetupError, match="LUMINA2_PYTHON"):
        environment.find_python()
    monkeypatch.setenv("LUMINA2_PYTHON", sys.executable)
    assert environment.find_python().version == environment.platform.python_version()


def test_a_server_answers_or_not():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.RequestHandlerClass.do_HEAD = lambda request: request.send_response(200) or request.end_headers()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert environment.answers(url)
    server.shutdown()
    server.server_close()
    assert not environment.answers(url)


def test_a_failed_step_shows_why(tmp_path):
    with pytest.raises(environment.SetupError, match=r"(?s)no room left.*Failed at: installing.*step\.log"):
        environment.run([sys.executable, "-c", "exit('no room left')"], "installing", tmp_path / "step.log")
