# Sourced by the other scripts: sets PYTHON to an interpreter in which requirement.txt is satisfied, and puts the
# repository on its path. The active Python serves if it has everything; else .venv is made and filled once.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE

# Exits 0 if every pin of requirement.txt is installed in this interpreter.
satisfied() {
    "$1" - "$ROOT/requirement.txt" <<'PY' 2>/dev/null
import sys
from importlib.metadata import version
version("tva-tasks")  # the line "-e ./lm-evaluation-harness"
for line in open(sys.argv[1]):
    name, _, wanted = line.split("#")[0].strip().partition("==")
    if wanted and version(name).split("+")[0] != wanted:  # torch's version carries its build, as in 2.13.0+cpu
        sys.exit(1)
PY
}

PYTHON="$(command -v python || command -v python3)"
if ! satisfied "$PYTHON"; then
    if ! satisfied "$ROOT/.venv/bin/python"; then
        echo "installing requirement.txt into $ROOT/.venv (once, some minutes)"
        [ -x "$ROOT/.venv/bin/python" ] || "$PYTHON" -m venv "$ROOT/.venv"
        (cd "$ROOT" && .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirement.txt)
    fi
    PYTHON="$ROOT/.venv/bin/python"
fi
