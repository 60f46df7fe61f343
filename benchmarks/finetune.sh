#!/usr/bin/env bash
# What each term of fine-tuning's loss is worth at the same budget: cross-entropy alone, with the KL to the dense model,
# with its hidden states as well; mini Mistral at 50%, its shipped mask, three seeds. Some 40 minutes on two CPU cores;
# a run that has its results is not repeated. Prints the table of finetune.md.
#   bash benchmarks/finetune.sh [OUTPUT]     default: out/finetune
set -euo pipefail
source "$(dirname "$0")/../script/env.sh"
cd "$ROOT"

OUTPUT=${1:-out/finetune}
for seed in 0 1 2; do
    for terms in ce kl kl_hidden; do
        folder="$OUTPUT/$terms-$seed"
        [ -f "$folder/results.json" ] && continue
        case $terms in
        ce) flags="--distill False" ;;
        kl) flags="" ;;
        kl_hidden) flags="--distill_hidden_alpha 20" ;;
        esac
        SEED=$seed bash script/tva_fine.sh $flags
    done
done
"$PYTHON" benchmarks/collect_finetune.py "$OUTPUT"
