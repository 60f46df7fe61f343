"""Opens checkpoints in the transformers of the interpreter that runs it, which needs nothing of this project.

    python opened_folders.py FOLDER...

Each folder holds `EXPECTED` beside the checkpoint. Of each it prints a line of JSON: the largest difference of the
logits, or the error.
"""

import json
import sys
from pathlib import Path

EXPECTED = "expected.safetensors"  # ``input_ids``, the ``logits`` of the model that was saved, what `TEXT` is cut into
TEXT = "w5 w3 w6"


def difference(folder):
    """The largest difference of the logits, without a cache and of the last token with one."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    expected = load_file(folder / EXPECTED)
    ids, wanted = expected["input_ids"], expected["logits"]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer(TEXT)["input_ids"] == expected["of_text"].tolist() and "w3" in tokenizer.all_special_tokens
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        last = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
    assert whole.shape == wanted.shape and last.shape == wanted[:, -1:].shape
    return max(float((whole - wanted).abs().max()), float((last - wanted[:, -1:]).abs().max()))


def main():
    for name in sys.argv[1:]:
        try:
            said = {"difference": difference(Path(name))}
        except Exception as error:  # each version fails in its own ways
            said = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
