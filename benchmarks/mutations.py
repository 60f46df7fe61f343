"""Do the tests see what must not go wrong? Each mutation is put into a copy of the project, and its tests must fail.

python -m benchmarks.mutations
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*_cache", "out", "shared")


@dataclass(frozen=True)
class Mutation:
    """A mistake that somebody could make.

    Attributes:
        says: What goes wrong.
        path: The file.
        right: What stands there, once.
        wrong: What it becomes.
        tests: What must fail.
    """

    says: str
    path: str
    right: str
    wrong: str
    tests: str


MUTATIONS = [Mutation(**row) for row in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))]


def survives(mutation: Mutation) -> bool:
    """Tells whether the tests pass although the mistake is there.

    Raises:
        ValueError: If what is to be changed does not stand in its file exactly once.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        path = copy / mutation.path
        source = path.read_text(encoding="utf-8")
        if source.count(mutation.right) != 1:
            raise ValueError(f"{mutation.path} holds {mutation.right!r} {source.count(mutation.right)} times, not once")
        path.write_text(source.replace(mutation.right, mutation.wrong), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutation.tests]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise ValueError(f"{mutation.says}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 0


def main() -> None:
    """Tries every mutation and prints a line each; exit code 1 if one survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those whose words contain this")
    args = parser.parse_args()
    alive = 0
    for mutation in MUTATIONS:
        if args.only in mutation.says:
            survived = survives(mutation)
            alive += survived
            print(f"{'SURVIVES' if survived else 'seen    '}  {mutation.says}  ({mutation.tests})", flush=True)
    sys.exit(alive > 0)


if __name__ == "__main__":
    main()
