"""A GGUF file in llama.cpp: its logits of a few tokens, by a process that reads them all, then one by one.

Run as a script, it is that process: it knows llama.cpp alone, and what crashes there takes nobody along.

    python in_llama_cpp.py FILE LOGITS.npz THREADS TOKEN [TOKEN ...]
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

_OPTIONS = {"n_ctx": 64, "logits_all": True, "type_k": 0, "type_v": 0}  # a KV cache in float32


def opened(path: Path, threads: int, **options: Any) -> Any:
    """Returns a file opened in llama.cpp, in this process."""
    from llama_cpp import Llama

    return Llama(str(path), n_threads=threads, n_threads_batch=threads, verbose=False, **options)


def logits_in_llama_cpp(path: Path, tokens: list[int], threads: int) -> dict[str, np.ndarray]:
    """Returns the logits of tokens that are read at once, ``prefill``, and one by one, ``decode``.

    The KV cache is in float32.

    Returns:
        Shape ``(tokens, vocabulary)`` each.

    Raises:
        RuntimeError: If the process of llama.cpp ended without them; the last line that it wrote, or the signal.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "logits.npz")
        words = [str(path), str(out), str(threads), *map(str, tokens)]
        ended = subprocess.run([sys.executable, "-P", __file__, *words], capture_output=True, text=True)
        if ended.returncode:
            lines = ended.stderr.strip().splitlines()
            raise RuntimeError(f"signal {-ended.returncode}" if ended.returncode < 0 or not lines else lines[-1])
        with np.load(out) as found:
            return dict(found)


def main(file: str, out: str, threads: str, *tokens: str) -> None:
    """Writes both logits."""
    read, llama = [int(token) for token in tokens], opened(Path(file), int(threads), **_OPTIONS)
    found = {}
    for what, chunks in (("prefill", [read]), ("decode", [[token] for token in read])):
        llama.reset()
        for chunk in chunks:
            llama.eval(chunk)
        found[what] = np.array(llama.scores[: len(read)])
    np.savez(out, **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
