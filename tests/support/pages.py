"""The pages that users read: README and docs/, their commands and their code."""

import re

from support.tiny import ROOT

PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
NOT_RUN = "# not run by the tests"


def blocks(page, language):
    """Returns the fenced blocks of a language on a page."""
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


# A page's own test holds those of docs/models.md: checkpoints of the hub.
_HELD = [page for page in PAGES if page != "docs/models.md"]
COMMANDS = [line for page in _HELD for block in blocks(page, "bash") for line in block.strip().splitlines()]


def code(words):
    """Returns the only block of Python with some words, on any page."""
    (found,) = (block for page in _HELD for block in blocks(page, "python") if words in block)
    return found


def commands(words):
    """Returns the commands with some words, each once."""
    return [line for line in dict.fromkeys(COMMANDS) if words in line]
