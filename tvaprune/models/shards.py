"""The weights of a checkpoint where they lie: safetensors files, read one weight at a time and some rows at a time."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from tvaprune.errors import InputError
from tvaprune.models.pruned import shared_names
from tvaprune.models.vetting import INDEX, WEIGHTS, Stored, finite, shards

PART = 2**24  # numbers read at a time: 64 MiB in float32
_OLD = r"rotary_emb\.inv_freq|(^|\.)position_ids$"  # buffers of older checkpoints, which are computed now


class Shards:
    """A model's weights on disk.

    Args:
        model: The model that they are of; its weights may be on the meta device.
        stored: What the files hold.
        dtype: The precision that they are read in.
        named: How a message begins: the flag and the folder.

    Attributes:
        missing: Names of weights that no file has.
        unknown: Names in the files that are none of the model's.
        ties: Pairs of names that the model ties and the files both have.
    """

    def __init__(self, model: PreTrainedModel, stored: dict[str, Stored], dtype: torch.dtype, named: str) -> None:
        self.dtype, self._stored, self._named, self._names = dtype, stored, named, dict[str, str]()
        self.missing: list[str] = []
        self.ties: list[tuple[str, str]] = []
        for names in shared_names(model):
            there = [name for name in names if name in stored]
            self._names |= dict.fromkeys(names, there[0] if there else names[0])
            self.missing += [] if there else names
            self.ties += [(there[0], name) for name in there[1:]]
        ignored = re.compile("|".join([_OLD, *(model._keys_to_ignore_on_load_unexpected or ())]))
        self.unknown = [name for name in stored if name not in self._names and not ignored.search(name)]

    def parts(self, name: str) -> Iterator[torch.Tensor]:
        """Yields a weight from its first row to its last, some rows at a time.

        Raises:
            InputError: If it holds NaN or infinity.
        """
        for part in self._read(self._names[name]):
            finite(name, part, self._named)
            yield part

    def _read(self, name: str) -> Iterator[torch.Tensor]:
        """Yields a tensor of the files."""
        found = self._stored[name]
        rows = found.shape[0] if found.shape else 1
        step = max(1, PART * rows // max(1, torch.Size(found.shape).numel()))
        with safe_open(found.file, framework="pt") as file:
            part = file.get_slice(name)
            for start in range(0, rows, step):
                yield part[start : start + step].to(self.dtype)

    def tied(self) -> bool:
        """Tells whether what the model ties is equal where the files have it twice."""
        pairs = ((self._read(first), self._read(second)) for first, second in self.ties)
        return all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))

    def weight(self, name: str) -> torch.Tensor:
        """Returns a weight whole, on the CPU; with `parts`' error."""
        whole, start = torch.empty(self._stored[self._names[name]].shape, dtype=self.dtype), 0
        for part in self.parts(name):
            whole[start : start + len(part)] = part
            start += len(part)
        return whole


def files_of(path: str | Path, named: str) -> list[Path]:
    """Returns the safetensors files of a folder or of a hub id, which are fetched as transformers fetches them.

    Raises:
        InputError: If there are none, or an index names what is no file of the folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        for name in (WEIGHTS, INDEX):
            found = cached_file(str(path), name, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                folder = Path(found).parent
                if name == INDEX:
                    get_checkpoint_shard_files(str(path), found)
                break
    files = shards(folder, named)
    if not files:
        raise InputError(
            f"{named}: has no {WEIGHTS} and no {INDEX}, and --stream True reads nothing else: save it once more by "
            "transformers' save_pretrained, or leave --stream out"
        )
    return files
