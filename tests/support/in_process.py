"""Commands of the toolkit run in this process, as a user would, and what they leave."""

import contextlib
import io
import json
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

from tvaprune import cli

TEMPORARY = (".part", ".old-", ".tmp")


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        trace: The traceback, where it ended in one.
    """

    code: int
    out: str
    err: str
    trace: str = ""

    @property
    def fault(self) -> str:
        """What is wrong with the end: a traceback, or not the one line that is due; empty if nothing is."""
        if self.trace:
            return self.trace
        if self.code == 0:
            return ""
        line = self.err.rstrip("\n").rsplit("\n", 1)[-1]
        if self.code != 2 or not line.rsplit("\r", 1)[-1].startswith("tvaprune: ") or "Traceback" in self.err:
            return f"code {self.code}: {self.err[-500:]}"
        return "" if line.rsplit("\r", 1)[-1].isprintable() else f"control characters: {line!r}"


def run(*words: object, stdin: str = "") -> Ended:
    """Runs ``tvaprune WORDS`` in this process; warnings are shown, as a user has them, and no errors."""
    out, err, before = io.StringIO(), io.StringIO(), (sys.argv, sys.stdin)
    code, trace = 1, ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.argv, sys.stdin = ["tvaprune", *map(str, words)], io.StringIO(stdin)
        try:
            code = cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            trace = traceback.format_exc()
        finally:
            sys.argv, sys.stdin = before
    return Ended(code, out.getvalue(), err.getvalue(), trace)


def strict_json(path: Path) -> object:
    """Reads JSON as the standard has it: NaN and infinities are errors."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def half_written(folder: Path) -> list[str]:
    """Returns the names below a folder that a finished command may not leave: temporary ones, and broken JSON."""
    wrong = []
    for path in folder.rglob("*"):
        if any(part in path.name for part in TEMPORARY):
            wrong.append(str(path))
        elif path.suffix == ".json" and path.is_file():
            try:
                strict_json(path)
            except ValueError as error:
                wrong.append(f"{path}: {error}")
    return wrong
