#!/usr/bin/env bash
# What the gates' training settings are worth: one setting changed at a time, on the validation split, folded and
# refitted, in the checkpoint's own basis. Some 40 minutes on two idle CPU cores; what is measured is not measured
# again. Prints the table of gates.md.
#   bash benchmarks/gates.sh [OUTPUT]     default: out/gates
set -euo pipefail
NEEDS=text
source "$(dirname "$0")/../script/env.sh"
cd "$ROOT"

OUTPUT=${1:-out/gates}

# One variant: its name, then the flags that differ.
variant() {
    local name=$1
    shift
    "$PYTHON" -m tvaprune compare --models mistral_saves_tva/mini_mistral --methods vib --sparsities 0.5 --seeds 0 1 \
        --rotate off --split validation --max_eval_samples 128 --zero_eval_seeds --output "$OUTPUT/$name" "$@" >/dev/null
}

variant default
variant settle_share-0 --settle_share 0
variant cross_entropy --distill False
variant gate_noise-sequence --gate_noise sequence
variant vib_learning_rate-0.2 --vib_learning_rate 0.2
variant gate_ce_weight-0.5 --gate_ce_weight 0.5
variant distill_temp-2 --distill_temp 2
variant kl_factor-1e-4 --kl_factor 1e-4
variant blocks-8x150 --per_device_train_batch_size 8
variant steps-900 --train_samples 3600
"$PYTHON" benchmarks/collect_gates.py "$OUTPUT"
