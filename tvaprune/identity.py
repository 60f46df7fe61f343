"""What a checkpoint or an adapter belongs to: written beside it, last, and compared before it is used."""

import json
import os
from pathlib import Path
from typing import Any

from tvaprune.errors import InputError

IDENTITY_NAME = "identity.json"  # written last into a checkpoint or an adapter: it says what they belong to


def write_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Writes what a checkpoint or an adapter belongs to, under a temporary name first."""
    temporary = folder / f".{IDENTITY_NAME}.part"
    temporary.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / IDENTITY_NAME)


def check_identity(name: str, folder: Path, identity: dict[str, Any]) -> None:
    """Compares what a checkpoint or an adapter belongs to with what it is wanted for.

    Raises:
        InputError: If they differ, or nothing says what it belongs to.
    """
    try:
        found = json.loads((folder / IDENTITY_NAME).read_text(encoding="utf-8"))
        differing = [key for key, value in identity.items() if found.get(key) != value]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: is no {name} of a fine-tuning (no readable {IDENTITY_NAME})") from error
    if differing:
        raise InputError(
            f"{folder}: is the {name} of another {' and '.join(differing)}; give the flags that it was made with"
        )
