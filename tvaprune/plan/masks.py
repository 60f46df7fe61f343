"""Gate means and log-variances as one value, and the mask files that carry them.

A mask file is a pickled ``dict`` of float32 tensors (docs/formats.md). A pickle runs code when it is loaded: it is
written here, and read by `mask_pickle` as data.
"""

import math
import pickle
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tvaprune.errors import InputError, check_file, quoted, reason
from tvaprune.files import clear_leftovers, read_json, replacing, write_json
from tvaprune.identity import Identity, differences
from tvaprune.models.shape import ModelShape
from tvaprune.models.units import PerUnit
from tvaprune.plan.log_alpha import log_alpha_of
from tvaprune.plan.mask_pickle import read_tensors
from tvaprune.plan.rotation import drop_rotations

MASK_NAME = "mask_info_{perplexity}.pkl"
LARGEST_FILE = 256 * 2**20  # bytes: twice the float64 mask of a model of 400 billion parameters
_TENSOR_OVERHEAD = 2048  # bytes that a pickle spends on a tensor beside its numbers: some 600
_NORM_WIDTH = "norm_width"
_KEY = re.compile(r"(?:(hidden)_mask|(attn|inter)_layer(\d{1,4}))_z_(mu|logD)")


@dataclass(frozen=True)
class Masks:
    """The trained gates of a model: what mask files hold.

    Attributes:
        keeps_norm_width: Whether norms went on dividing the sum of the kept dims' squares by the dense width while the
            gates were trained; else, as of the released masks, by the number of kept dims.
    """

    mu: PerUnit
    log_variance: PerUnit
    keeps_norm_width: bool = False

    @property
    def log_alpha(self) -> PerUnit:
        """The score of each unit: kept below 0, the smaller the surer."""
        return self.mu.map(log_alpha_of, self.log_variance)

    def plain(self) -> "Masks":
        """Returns the masks in float32 on the CPU, without gradients."""
        mu, log_variance = (v.map(lambda t: t.detach().float().cpu()) for v in (self.mu, self.log_variance))
        return replace(self, mu=mu, log_variance=log_variance)

    def check_fits(self, shape: ModelShape, origin: str) -> None:
        """Raises `InputError` if the masks are not those of a model of this shape."""
        if not self.mu.fits(shape):
            with torch.device("meta"):  # a broken config's sizes take no memory
                need = PerUnit.full(shape, 0.0).describe()
            raise InputError(f"{origin} holds {self.mu.describe()}; the model has {need}: give the mask of this model")


def save_masks(masks: Masks, path: Path) -> None:
    """Writes a mask file in the released format, whole or not at all."""
    masks, tensors = masks.plain(), {}
    for name, values in (("mu", masks.mu), ("logD", masks.log_variance)):
        tensors[f"hidden_mask_z_{name}"] = values.hidden
        for kind, layers in (("attn", values.attn), ("inter", values.inter)):
            tensors |= {f"{kind}_layer{i}_z_{name}": layer for i, layer in enumerate(layers)}
    if masks.keeps_norm_width:
        tensors[_NORM_WIDTH] = torch.tensor([float(len(masks.mu.hidden))])
    with replacing(path) as temporary, temporary.open("wb") as file:
        pickle.dump({key: tensor.clone() for key, tensor in tensors.items()}, file)  # each with a storage of its own


def load_masks(path: str | Path, shape: ModelShape | None = None) -> Masks:
    """Reads a mask file without running what it may carry.

    Args:
        shape: The model's, where it is known: a file that is larger than any mask of it is not read.

    Raises:
        InputError: If the file is missing, truncated, too large, holds anything but tensors, or other tensors than a
            mask's.
    """
    path = Path(path)
    check_file(f"--mask_loc {path}", path, "a mask_info_*.pkl")
    _check_size(path, shape)
    try:
        loaded = read_tensors(path.read_bytes())
    except InputError as error:
        raise InputError(f"--mask_loc {path}: {error}") from error
    except Exception as error:  # a broken pickle raises nearly anything
        raise InputError(
            f"--mask_loc {path}: not a readable mask file ({reason(error)}), perhaps truncated; "
            "give a whole mask_info_*.pkl"
        ) from error
    return _from_dict(loaded, path)


def _check_size(path: Path, shape: ModelShape | None) -> None:
    """Refuses a file that is larger than the model's mask in float64 could be."""
    size, most = path.stat().st_size, LARGEST_FILE
    if shape is not None:
        units = shape.hidden_size + sum(shape.num_key_value_heads) + sum(shape.intermediate_size)
        most = 16 * units + 2 * _TENSOR_OVERHEAD * (1 + 2 * shape.num_hidden_layers)
    if size > most:
        whose = "any model" if shape is None else "this model"
        raise InputError(
            f"--mask_loc {path}: is a file of {size:,} bytes, the mask of {whose} takes at most {most:,}: give the "
            "mask of this model"
        )


def keep_best(
    folder: Path, masks: Masks, perplexity: float, record: dict[str, object], before: Path | None = None
) -> Path:
    """Writes a mask named by its perplexity, and its JSON, if it beats the run's best so far; the others go last.

    Masks that another run left are no rivals, however good they are: they go when the new one is there.

    Args:
        record: What the JSON holds; its ``identity`` says which run it is.
        before: The run's best so far.

    Returns:
        The run's best mask, new or old.

    Raises:
        InputError: If the perplexity is no number, or what an earlier run left cannot be removed.
    """
    if not math.isfinite(perplexity):
        raise InputError("the mask's perplexity is not a number; lower --vib_learning_rate or use --dtype float32")
    path = before
    if path is None or perplexity < perplexity_of(path):
        path = folder / MASK_NAME.format(perplexity=perplexity)
        write_json(record | {"perplexity": perplexity}, path.with_suffix(".json"))  # first: no mask without its record
        save_masks(masks, path)
    clear_leftovers(folder)
    for old in sorted(folder.glob(MASK_NAME.format(perplexity="*")[:-4] + ".*"), reverse=True):  # .pkl before .json
        if old.stem != path.stem and old.suffix in (".pkl", ".json"):
            _remove(old)
    drop_rotations(folder)
    return path


def _remove(old: Path) -> None:
    try:
        old.unlink()
    except OSError as error:
        raise InputError(
            f"{old}: an earlier mask cannot be removed ({error.strerror}); remove it, or give another --output_dir"
        ) from error


def read_record(path: str | Path) -> dict[str, Any]:
    """Returns the JSON beside a mask file; nothing where there is none, as beside the released masks.

    Raises:
        InputError: If it is no JSON object.
    """
    beside = Path(path).with_suffix(".json")
    if not beside.is_file():
        return {}
    try:
        record = read_json(beside)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{beside}: the mask's record is not readable JSON ({type(error).__name__}); mend it, or move it away and "
            "give the mask's flags"
        ) from error
    if not isinstance(record, dict):
        raise InputError(f"{beside}: the mask's record is no JSON object; mend it, or move it away")
    return record


def best_mask(folder: Path, identity: Identity | None = None) -> Path | None:
    """Returns the mask with the lowest perplexity in a folder, by its name; with ``identity``, of that run's."""
    paths = list(folder.glob(MASK_NAME.format(perplexity="*")))
    if identity is not None:
        paths = [path for path in paths if not differences(read_record(path).get("identity", {}), identity)]
    return min(paths, key=perplexity_of, default=None)


def perplexity_of(path: Path) -> float:
    """Returns the perplexity in a mask file's name; infinity where there is none."""
    try:
        return float(path.stem.removeprefix(MASK_NAME.split("{")[0]))
    except ValueError:
        return math.inf


def _from_dict(loaded: dict[str, torch.Tensor], path: Path) -> Masks:
    """Sorts the tensors of a mask file by kind and layer."""
    norm_width = loaded.pop(_NORM_WIDTH, None)
    found: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for key, tensor in loaded.items():
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None or not isinstance(tensor, torch.Tensor) or tensor.dim() != 1:
            raise InputError(f"--mask_loc {path}: {quoted(key)} is no gate of a mask file; give a mask_info_*.pkl")
        tensor = tensor.float()  # first: what float64 holds may be infinite in float32
        if not torch.isfinite(tensor).all():
            raise InputError(f"--mask_loc {path}: '{key}' holds NaN or infinity; give the mask of a run that converged")
        hidden_kind, layer_kind, layer, name = match.groups()
        found.setdefault((hidden_kind or layer_kind, name), {})[int(layer or 0)] = tensor
    num_layers = max((max(layers) + 1 for layers in found.values()), default=0)
    values = {}
    for name in ("mu", "logD"):
        hidden, attn, inter = (found.get((kind, name), {}) for kind in ("hidden", "attn", "inter"))
        if list(hidden) != [0] or any(sorted(layers) != list(range(num_layers)) for layers in (attn, inter)):
            raise InputError(f"--mask_loc {path}: gates are missing; a mask has hidden, attn and inter of every layer")
        values[name] = PerUnit(
            hidden=hidden[0],
            attn=tuple(attn[i] for i in range(num_layers)),
            inter=tuple(inter[i] for i in range(num_layers)),
        )
    if any(mu.shape != log_d.shape for mu, log_d in zip(values["mu"], values["logD"], strict=True)):
        raise InputError(f"--mask_loc {path}: means and log-variances differ in size; give a whole mask_info_*.pkl")
    width = len(values["mu"].hidden)
    if norm_width is not None and not (isinstance(norm_width, torch.Tensor) and norm_width.tolist() == [width]):
        raise InputError(
            f"--mask_loc {path}: its {_NORM_WIDTH} is not that of its {width} hidden dims; give a whole mask_info_*.pkl"
        )
    return Masks(values["mu"], values["logD"], keeps_norm_width=norm_width is not None)
