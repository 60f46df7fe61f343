#!/usr/bin/env bash
# Learns a mask and measures the narrower model. Without arguments: the shipped miniature Mistral at 50%, on the
# documentation text of this machine, in some minutes on two CPU cores.
#   bash script/tva_prune.sh [MODEL MASK_SAVE VIB_LR TARGET_SPARSITY LAGRANGIAN_WARMUP ATT_MUL DATASET] [--FLAG VALUE ...]
# The flags are tva_prune.py's; they win over those set here. --resume_from_checkpoint True goes on.
# Relative paths are below the folder that this is called from.
set -euo pipefail

given=0 # arguments before the first flag
for word in "$@"; do [[ $word == --* ]] && break; given=$((given + 1)); done

if [ $given -ne 0 ] && [ $given -ne 7 ]; then
    echo "tva_prune.sh: got $given arguments, needs none or 7: MODEL MASK_SAVE VIB_LR TARGET_SPARSITY LAGRANGIAN_WARMUP ATT_MUL DATASET; flags come last" >&2
    exit 2
fi
NEEDS=ranges # a text of the user's own needs no more
if [ $given -eq 0 ] || [[ " $* " =~ [\ =,](python_docs|package_readmes)[\ ,] ]]; then NEEDS=text; fi
source "$(dirname "$0")/env.sh"

if [ $given -eq 0 ]; then
    UPDATE=(--weight_update reconstruct --refit_samples 256)
    if [[ " $*" == *" --weight_update"[\ =]* ]]; then UPDATE=(); fi # another may fit no blocks
    exec "$PYTHON" "$ROOT/tva_prune.py" \
        --model_name_or_path "$ROOT/mistral_saves_tva/mini_mistral" \
        --output_dir out/mini_mistral --overwrite_output_dir \
        --dataset_name python_docs --block_size 256 --ctx_length 256 \
        --target_sparsity 0.5 \
        --max_train_samples 1200 --per_device_train_batch_size 4 --max_eval_samples 256 \
        ${UPDATE[@]+"${UPDATE[@]}"} \
        "$@"
fi

MODEL=$1             # checkpoint folder or hub id
MASK_SAVE=$2         # output folder; the mask is MASK_SAVE/best/mask_info_<perplexity>.pkl
VIB_LR=$3            # learning rate of the gates: 0.05, above 50% sparsity 0.1
TARGET_SPARSITY=$4   # share of the decoder layers' parameters that goes
LAGRANGIAN_WARMUP=$5 # epochs over which the target rises: 0.1, above 60% sparsity 0.2
ATT_MUL=$6           # weight of the attention gates in the information loss: 256, above 60% sparsity 512
DATASET=$7           # c4, wikitext2, ptb, python_docs, or a path

exec "$PYTHON" "$ROOT/tva_prune.py" \
    --model_name_or_path "$MODEL" \
    --output_dir "$MASK_SAVE" \
    --vib_learning_rate "$VIB_LR" \
    --target_sparsity "$TARGET_SPARSITY" \
    --lagrangian_warmup_epochs "$LAGRANGIAN_WARMUP" \
    --att_mul "$ATT_MUL" \
    --dataset_name "$DATASET" \
    "${@:8}"
