"""`python -m tvaprune.export --format gguf|onnx|vanilla DIR OUT`: a pruned checkpoint in another format."""

from pathlib import Path
from typing import Any

from tvaprune.checkpoint.folder import load_pruned
from tvaprune.checkpoint.tokenizer import TOKENIZER_CONFIG
from tvaprune.errors import InOneLine, InputError
from tvaprune.export.gguf_file import QUANTIZATIONS, export_gguf
from tvaprune.export.onnx_graph import export_onnx
from tvaprune.export.vanilla import export_vanilla
from tvaprune.export.verify import require
from tvaprune.models.load import load_tokenizer

PACKAGES = {"gguf": ("gguf",), "onnx": ("onnx", "onnxscript", "onnxruntime"), "vanilla": ()}

OUTTYPE = "f16"


def export(
    format_name: str, folder: Path, out: Path, outtype: str = OUTTYPE, overwrite: bool = False, verify: bool = True
) -> None:
    """Writes a checkpoint in another format.

    Args:
        format_name: ``gguf``, ``onnx`` or ``vanilla``.
        folder: A folder of ``--save_pruned``.
        out: The GGUF file, or the folder of the other formats.
        outtype: Precision of a GGUF file's matrices.

    Raises:
        InputError: If a format or precision is unknown, a package is missing, the checkpoint cannot be used, or the
            output is in use, or is not apart from the checkpoint.
    """
    for name, value, known in (("format", format_name, PACKAGES), ("outtype", outtype, QUANTIZATIONS)):
        if value not in known:
            raise InputError(f"--{name} {value}: give {', '.join(sorted(known))}")
    if format_name != "gguf" and outtype != OUTTYPE:
        raise InputError(f"--outtype {outtype}: acts in --format gguf alone, the others are as the checkpoint; leave "
                         "it out")  # fmt: skip
    mine, place = folder.resolve(), out.resolve()
    if place in (mine, *mine.parents) or mine in place.parents:
        raise InputError(f"{out}: is the checkpoint, holds it or is within it; give a place apart from it")
    require(format_name, *PACKAGES[format_name])
    model = load_pruned(folder)
    if format_name == "gguf":
        export_gguf(model, folder, out, outtype, overwrite, verify)
        return
    tokenizer = _tokenizer(folder, model.config.vocab_size)
    if format_name == "onnx":
        export_onnx(model, folder, tokenizer, out, overwrite, verify)
    else:
        export_vanilla(model, tokenizer, out, overwrite, verify)


def _tokenizer(folder: Path, vocab_size: int) -> Any:
    there = (folder / TOKENIZER_CONFIG).is_file()
    return load_tokenizer(folder, vocab_size, str(folder)) if there else None


def main(arguments: list[str] | None = None) -> None:
    """Parses the flags and exports."""
    parser = InOneLine(prog="tvaprune export", description=__doc__)
    parser.add_argument("--format", required=True, choices=sorted(PACKAGES), help="what to write")
    parser.add_argument("checkpoint", type=Path, help="a folder of --save_pruned")
    parser.add_argument("out", type=Path, help="the .gguf file, or the folder of the other formats")
    parser.add_argument("--outtype", default=OUTTYPE, choices=list(QUANTIZATIONS), help="gguf: precision of matrices")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace an earlier export")
    parser.add_argument("--no_verify", action="store_true", help="do not compare the result with the checkpoint")
    args = parser.parse_args(arguments)
    export(args.format, args.checkpoint, args.out, args.outtype, args.overwrite_output_dir, not args.no_verify)
    print(f"{args.format}: {args.out}")
