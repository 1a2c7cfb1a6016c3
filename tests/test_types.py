"""ember.py and what a user sees of it, under both type checkers in strict mode."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("checker", ["mypy --python-executable", "pyright --pythonpath"])
def test_type_checker_finds_no_fault(checker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRIGHT_PYTHON_IGNORE_WARNINGS", "1")  # it looks for no newer version
    command = [sys.executable, "-m", *checker.split(), sys.executable]  # files: pyproject.toml
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
