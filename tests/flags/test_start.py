"""What answers at once: nothing heavy is imported before a command is known to be one."""

import subprocess
import sys

import pytest
from support import tiny

WATCHED = """
import runpy, sys
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
sys.path.insert(0, ".")
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    print("exit", end.code)
print("heavy", sorted({"torch", "transformers", "datasets"} & set(sys.modules)))
"""


def heavy(*command):
    """Runs a script of the repository in a process of its own: its exit code, and the heavy libraries it imported."""
    result = subprocess.run(
        [sys.executable, "-c", WATCHED, *command], cwd=tiny.ROOT, capture_output=True, text=True, timeout=120
    )
    return result.stdout.splitlines()[-2:], result.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("tva_prune.py", "--no_such_flag", "1"), "--no_such_flag is no flag of prune"),
        (("tva_prune.py", "--lora_r", "2"), "--lora_r acts in finetune, not in prune"),
        (("lora_ft_vib.py", "--do_train", "--no_such_flag"), "--no_such_flag is no flag of prune"),
        (("lora_ft_vib.py",), "nothing to do"),
    ],
)
def test_a_mistyped_flag_is_told_before_anything_heavy_is_imported(command, message):
    said, error = heavy(*command)
    assert said == ["exit 2", "heavy []"]
    assert message in error


def test_what_is_needed_is_imported():
    said, _ = heavy("tva_prune.py", "--help")  # control: transformers' own flags are read off it
    assert said[1] != "heavy []"


def test_the_package_itself_is_light():
    watch = "import sys, tvaprune; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", watch], cwd=tiny.ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
