"""The shell scripts: which interpreter they take, and whose folder relative paths are below."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ABSENT = "no-such-package-anywhere"
IN_RANGE, PINNED = 'dependencies = ["pytest>=1"]', f"pytest=={version('pytest')}"


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def choose(tmp_path):
    """Sources env.sh in a made-up repository: the active Python is this one, .venv's lacks all until pip has run."""
    repository, log = tmp_path / "clone", tmp_path / "pip"
    active, venv = tmp_path / "bin" / "python", repository / ".venv" / "bin" / "python"
    write_program(active, f'exec "{sys.executable}" "$@"')
    write_program(venv, f'[ "$1" = - ] && exit 1; echo "$PWD: $*" >> "{log}"; [ "$2" = pip ]')
    (repository / "script").mkdir()
    shutil.copy(ROOT / "script" / "env.sh", repository / "script")

    def run(needs, project=IN_RANGE, pins=PINNED, text=None, writes=True):
        files = {"pyproject.toml": f"[project]\n{project}\n", "requirement.txt": pins, "requirement-text.txt": text}
        for name, content in files.items():
            if content is not None:
                (repository / name).write_text(content, encoding="utf-8")
        result = subprocess.run(
            ["bash", "-euc", 'source "$0"; echo "$PYTHON"', repository / "script" / "env.sh"], cwd=tmp_path,
            env=os.environ | {
                "PATH": f"{active.parent}:{os.environ['PATH']}", "NEEDS": needs,
                "PYTHONDONTWRITEBYTECODE": "" if writes else "1",
            },
            capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return Path(result.stdout.rstrip("\n")), result.stderr

    run.active, run.venv, run.repository, run.log = active, venv, repository, log
    return run


@pytest.mark.parametrize("needs", ["ranges", "pins"])
def test_a_python_that_has_the_pins_is_used_without_a_word(choose, needs):
    assert choose(needs) == (choose.active, "")


def test_a_python_in_range_is_used_as_it_is_and_one_line_says_how_the_pins_are_had(choose):
    python, said = choose("ranges", pins="pytest==0.1")
    assert python == choose.active and not choose.log.exists()
    assert said.count("\n") == 1 and f"pytest {version('pytest')}, not ==0.1; for the exact versions: pip" in said


@pytest.mark.parametrize(
    ("needs", "files", "lacks"),
    [
        ("ranges", {"project": f'dependencies = ["pytest>=1", "{ABSENT}>=1"]'}, f"no {ABSENT}"),
        ("ranges", {"project": 'dependencies = ["pytest>=1,<2"]'}, f"pytest {version('pytest')}, not <2,>=1"),
        ("pins", {"pins": "pytest==0.1"}, f"pytest {version('pytest')}, not ==0.1"),
        ("pins", {"pins": f"{PINNED}\n-r requirement-text.txt # why", "text": f"{ABSENT}==1"}, f"no {ABSENT}"),
        ("text", {"text": f"{ABSENT}==1"}, f"no {ABSENT}"),
    ],
)
def test_where_something_is_missing_or_out_of_range_the_pins_are_installed_into_venv(choose, needs, files, lacks):
    python, said = choose(needs, **files)
    assert python == choose.venv
    assert said.count("\n") == 1 and f"{choose.active} has {lacks}\n" in said
    installed = choose.log.read_text(encoding="utf-8")
    flags = "--quiet --disable-pip-version-check --no-compile"
    assert installed == f"{choose.repository}: -m pip install {flags} -r requirement.txt\n"


def test_where_python_may_not_write_what_it_compiles_all_is_compiled_at_once(choose):
    python, _ = choose("pins", pins="pytest==0.1", writes=False)  # whatever does not compile, as templates do not
    assert python == choose.venv
    _, compiled = choose.log.read_text(encoding="utf-8").splitlines()
    assert compiled.endswith(f": -m compileall -qq -j 0 -x /tests/ {choose.repository}/.venv/lib")


def test_a_venv_that_serves_is_used_where_the_active_python_does_not(choose):
    write_program(choose.venv, "exit 0")
    assert choose("ranges", project=f'dependencies = ["{ABSENT}"]') == (choose.venv, "")


def test_a_python_without_packaging_does_not_serve(choose):
    write_program(choose.active, f'exec "{sys.executable}" -I -S "$@"')
    python, said = choose("ranges")
    assert python == choose.venv and f"{choose.active} has no packaging" in said


def test_a_module_in_the_callers_folder_is_not_taken_for_packaging(choose, tmp_path):
    (tmp_path / "packaging.py").write_text("raise SystemExit(1)", encoding="utf-8")
    assert choose("ranges") == (choose.active, "")


def test_a_text_of_ones_own_needs_none_of_the_demonstration_texts_packages(choose):
    assert choose("ranges", text=f"{ABSENT}==1") == (choose.active, "")


def test_the_demonstration_text_needs_its_packages_in_any_version_and_says_that_figures_differ(choose):
    python, said = choose("text", text="packaging==0.1")
    assert python == choose.active
    assert said.count("\n") == 1 and "not ==0.1; for the exact versions, and with them the text that README" in said


def test_a_folder_among_the_pins_is_looked_for_by_the_name_that_it_is_installed_by(choose):
    (choose.repository / "tasks").mkdir()
    for name, serves in (("pytest", choose.active), (ABSENT, choose.venv)):
        (choose.repository / "tasks" / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n', encoding="utf-8")
        assert choose("pins", pins="-e ./tasks # why")[0] == serves


def test_every_file_that_the_requirements_include_is_there_and_is_pinned():
    lines = (ROOT / "requirement.txt").read_text(encoding="utf-8").splitlines()
    included = [line.split()[1] for line in lines if line.startswith("-r ")]
    assert included == ["requirement-text.txt", "requirement-dev.txt"]
    for name in included:
        pins = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        assert pins and [pin for pin in pins if "==" not in pin] == []


@pytest.fixture
def call(tmp_path):
    """Calls a script from another folder; the interpreter has everything and prints its folder and its arguments."""
    write_program(tmp_path / "bin" / "python", '[ "$1" = - ] || printf "%s\\n" "$PWD" "$@"')
    (tmp_path / "work").mkdir()

    def run(script, *arguments):
        result = subprocess.run(
            ["bash", os.path.relpath(ROOT / "script" / script, tmp_path / "work"), *arguments], cwd=tmp_path / "work",
            env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        folder, *passed = result.stdout.splitlines()
        return Path(folder), passed

    return run


MINIATURES = [str(ROOT / "mistral_saves_tva" / "mini_mistral"), str(ROOT / "llama3_saves_tva" / "mini_llama3")]


@pytest.mark.parametrize(
    ("script", "program", "arguments"),
    [
        ("tva_prune.sh", "tva_prune.py", ["./model", "out", "0.05", "0.5", "0.1", "256", "./a.txt", "--data_dir", "d"]),
        ("tva_fine.sh", "lora_ft_vib.py", ["./model", "out", "mask_info_1.0.pkl", "--data_dir", "d"]),
        ("compare.sh", "tvaprune compare", ["./model", "./a.txt", "--output", "out"]),
    ],
)
def test_what_is_given_is_below_the_callers_folder(call, tmp_path, script, program, arguments):
    folder, passed = call(script, *arguments)
    assert folder == tmp_path / "work"
    called = ["-P", "-m", *program.split()] if " " in program else [str(ROOT / program)]
    assert passed[: len(called)] == called
    assert set(arguments) <= set(passed) and [word for word in passed[1:] if str(ROOT) in word] == []


@pytest.mark.parametrize(
    ("script", "flag", "output"),
    [
        ("tva_prune.sh", "--model_name_or_path", "out/mini_mistral"),
        ("tva_fine.sh", "--model_name_or_path", "out/mini_mistral_tuned"),
        ("compare.sh", "--models", None),
        ("pretrain_mini.sh", None, "out/pretrain/mistral"),
    ],
)
def test_without_arguments_the_shipped_model_is_read_and_the_callers_folder_is_written_to(
    call, tmp_path, script, flag, output
):
    folder, passed = call(script)
    assert folder == tmp_path / "work"
    if flag is not None:
        assert passed[passed.index(flag) + 1] == MINIATURES[0] and Path(MINIATURES[0]).is_dir()
    if output is not None:
        assert passed[passed.index("--output_dir") + 1] == output
    if "--mask_loc" in passed:
        assert Path(passed[passed.index("--mask_loc") + 1]).is_absolute()
        assert Path(passed[passed.index("--mask_loc") + 1]).is_file()


def test_the_comparison_takes_both_miniatures_unless_a_model_is_given(call):
    assert call("compare.sh", "--seeds", "3")[1][4:] == ["--models", *MINIATURES, "--seeds", "3"]
    assert call("compare.sh", "model", "--seeds", "3")[1][4:] == ["--models", "model", "--seeds", "3"]


@pytest.mark.parametrize("script", ["tva_prune.sh", "tva_fine.sh"])
def test_a_wrong_number_of_arguments_is_refused_before_anything_is_installed(tmp_path, script):
    write_program(tmp_path / "python", f'touch "{tmp_path}/called"; exit 1')
    result = subprocess.run(
        ["bash", ROOT / "script" / script, "model"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert result.returncode == 2 and "got 1 arguments" in result.stderr
    assert not (tmp_path / "called").exists()
