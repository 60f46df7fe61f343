"""`python -m tvaprune.export --format gguf|onnx|vanilla DIR OUT`: the verb `tvaprune export`."""

import sys

from tvaprune.cli import run_command
from tvaprune.stages.export import main

if __name__ == "__main__":
    sys.exit(run_command(main))
