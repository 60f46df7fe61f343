#!/usr/bin/env bash
# Learned gates against one-shot scores at the same sparsity, folding only, on both miniature models and three seeds.
# Some 40 minutes on two CPU cores; a run that has its results is not repeated. Prints the table of quality.md.
#   bash benchmarks/quality.sh [OUTPUT]     default: out/quality
set -euo pipefail
source "$(dirname "$0")/../script/env.sh"
cd "$ROOT"

OUTPUT=${1:-out/quality}
for model in mistral_saves_tva/mini_mistral llama3_saves_tva/mini_llama3; do
    for seed in 0 1 2; do
        for method in vib magnitude wanda_sp flap; do
            folder="$OUTPUT/$(basename $model)-$method-$seed"
            [ -f "$folder/results.json" ] && continue
            samples=128 # calibration blocks of the scores; the gates train on 300 steps of 4 blocks
            [ $method = vib ] && samples=1200
            "$PYTHON" tva_prune.py --model_name_or_path $model --prune_method $method --target_sparsity 0.5 --seed $seed \
                --dataset_name python_docs --block_size 256 --ctx_length 256 --max_train_samples $samples \
                --per_device_train_batch_size 4 --max_eval_samples 256 --output_dir "$folder" \
                --overwrite_output_dir
        done
    done
done
"$PYTHON" benchmarks/collect.py "$OUTPUT"
