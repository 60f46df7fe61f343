"""How the package reads: no function is longer than a screen, and its types hold."""

import ast
import subprocess
import sys

import pytest
from support.tiny import ROOT

LONGEST = 50  # lines, signature and docstring included
FILES = sorted((ROOT / "tvaprune").rglob("*.py"))


def too_long(source):
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > LONGEST]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_longer_than_a_screen(path):
    assert too_long(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("lines", "found"), [(LONGEST - 1, []), (LONGEST, ["f"])])
def test_a_function_that_is_too_long_is_found(lines, found):
    assert too_long("class C:\n  def f():\n" + "    x = 1\n" * lines) == found


@pytest.mark.slow
def test_mypy_finds_nothing():
    pytest.importorskip("mypy")
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
