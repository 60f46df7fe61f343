#!/usr/bin/env bash
# Trains the two miniature models anew, from nothing but the text of this machine: about an hour each on one CPU core.
# An interrupted run goes on from its last checkpoint. A relative OUTPUT is below the folder that this is called from.
#   bash script/pretrain_mini.sh [OUTPUT]     default: out/pretrain
set -euo pipefail
NEEDS=text
source "$(dirname "$0")/env.sh"

OUTPUT=${1:-out/pretrain}
for family in mistral llama; do
    "$PYTHON" "$ROOT/script/pretrain_mini.py" --family "$family" --output_dir "$OUTPUT/$family" --work_dir "$OUTPUT/$family-checkpoints"
done
