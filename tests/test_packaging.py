"""What is installed: real builds by the real backend, installed by pip, without the network."""

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")

USER_PROGRAM = """
    import asyncio

    from ember import Reply, models


    async def main() -> None:
        reply: Reply[str] = await models.gpt4("Name three rivers", temperature=0)
        numbers: list[int] = (await models.claude("Count to three", output=list[int])).data
        print(reply.text, numbers)
        async for piece in models.gpt4.stream("Tell me a story"):
            print(piece.upper())


    asyncio.run(main())
"""


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; the test fails with it where the command does."""
    done = subprocess.run(command, cwd=cwd, text=True, capture_output=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Environment:
    """An environment of its own, in which only what Ember depends on is there already."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def install(self, *what: str | Path) -> None:
        """Install by pip, from files alone."""
        pip = ["-m", "pip", "--isolated", "--quiet", "--python", self.python, "install"]
        offline = ["--no-build-isolation", "--no-deps", "--no-index"]
        run(sys.executable, *pip, *offline, *what, cwd=self.folder)

    def eval(self, expression: str) -> str:
        """What an expression is there, `ember` and `ember_accel` being imported, as text."""
        program = f"import ember, ember_accel, importlib.metadata as metadata; print({expression})"
        return run(self.python, "-c", program, cwd=self.folder).strip()


def environment(folder: Path) -> Environment:
    """A new environment. Its .pth reaches the dependencies, but no .pth files among them."""
    venv.create(folder)
    [site] = folder.glob("[Ll]ib/**/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return Environment(folder)


def checkout(folder: Path) -> Path:
    """A copy of the sources."""
    return Path(shutil.copytree(ROOT, folder, ignore=NOT_SOURCE))


def contents(wheel: Path) -> dict[str, bytes]:
    """The files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that a release has: built from the sdist, which is built from the checkout."""
    folder = tmp_path_factory.mktemp("release")
    source = checkout(folder / "checkout")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=source)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with that wheel installed."""
    env = environment(tmp_path_factory.mktemp("installed"))
    env.install(wheel)
    return env


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's program, in a folder of its own."""
    path = tmp_path_factory.mktemp("user") / "program.py"
    path.write_text(textwrap.dedent(USER_PROGRAM).lstrip(), encoding="utf-8")
    return path


def test_wheel_holds_ember_as_a_typed_package_and_nothing_else(wheel: Path) -> None:
    files = contents(wheel)
    assert {name.split("/")[0] for name in files} == {
        "ember", "ember_accel", "ember_llm-0.1.0.dist-info",
    }
    assert files["ember/__init__.py"] == (ROOT / "ember.py").read_bytes()
    assert {name for name in files if name.startswith("ember/")} == {
        "ember/__init__.py", "ember/py.typed",
    }
    assert {"ember_accel/__init__.py", "ember_accel/py.typed"} <= files.keys()


def test_wheel_from_the_sdist_equals_the_wheel_from_the_checkout(
    wheel: Path, tmp_path: Path
) -> None:
    source = checkout(tmp_path / "checkout")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, cwd=source)
    assert contents(tmp_path / wheel.name) == contents(wheel)


def test_installed_wheel_imports_with_its_marker_and_metadata(installed: Environment) -> None:
    module = Path(installed.eval("ember.__file__"))
    assert module.parts[-3:] == ("site-packages", "ember", "__init__.py")
    assert module.with_name("py.typed").is_file()
    assert installed.eval("metadata.version('ember-llm')") == "0.1.0"
    assert installed.eval("metadata.metadata('ember-llm')['License-Expression']") == "Apache-2.0"


def test_users_program_passes_mypy_strict(installed: Environment, program: Path) -> None:
    where = ("--python-executable", installed.python, "--cache-dir", ROOT / ".mypy_cache")
    out = run(sys.executable, "-m", "mypy", "--strict", *where, program, cwd=program.parent)
    assert "no issues found" in out


def test_users_program_passes_pyright_strict(
    installed: Environment, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRIGHT_PYTHON_IGNORE_WARNINGS", "1")  # it looks for no newer version
    strict = '{"typeCheckingMode": "strict"}'
    program.with_name("pyrightconfig.json").write_text(strict, encoding="utf-8")
    where = ("--pythonpath", installed.python)
    assert "0 errors" in run(sys.executable, "-m", "pyright", *where, cwd=program.parent)


def test_editable_install_imports_the_checkouts_own_file(tmp_path: Path) -> None:
    source = checkout(tmp_path / "checkout")
    env = environment(tmp_path / "env")
    env.install("--editable", source)
    assert env.eval("ember.__file__") == str(source / "ember.py")
    with (source / "ember.py").open("a", encoding="utf-8") as module:
        module.write("\n\nedited = 'seen'\n")
    assert env.eval("ember.edited") == "seen"
