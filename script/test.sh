#!/usr/bin/env bash
# All checks: lint, format, tests, the types among them. Arguments go to pytest, as in: bash script/test.sh -k plan
set -euo pipefail
NEEDS=pins # other versions have other opinions of format and types
source "$(dirname "$0")/env.sh"
cd "$ROOT"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# The slow tests too, unless the arguments choose: a bare pytest leaves them out.
# A file's tests stay in one process: they share what they made.
"$PYTHON" -m pytest -n 2 --dist loadfile -m "not gpu and not network" "$@"
