#!/usr/bin/env bash
# Prunes by a mask, fine-tunes with LoRA under distillation from the dense model, evaluates before and after; leaves an
# adapter and a merged model. Without arguments: the shipped miniature Mistral and its mask, in some minutes on two CPU
# cores.
#   bash script/tva_fine.sh [MODEL SAVE_MODEL PATH_MASK] [--FLAG VALUE ...]
# The flags are lora_ft_vib.py's; they win over those set here. --resume_from_checkpoint True goes on.
# Relative paths are below the folder that this is called from.
set -euo pipefail

given=0 # arguments before the first flag
for word in "$@"; do [[ $word == --* ]] && break; given=$((given + 1)); done

if [ $given -ne 0 ] && [ $given -ne 3 ]; then
    echo "tva_fine.sh: got $given arguments, needs none or 3: MODEL SAVE_MODEL PATH_MASK; flags come last" >&2
    exit 2
fi
NEEDS=ranges # a text of the user's own needs no more
if [ $given -eq 0 ] || [[ " $* " =~ [\ =,](python_docs|package_readmes)[\ ,] ]]; then NEEDS=text; fi
source "$(dirname "$0")/env.sh"

if [ $given -eq 0 ]; then
    # The released defaults serve a large model and 70 steps of 128 blocks. A miniature is far from the dense model and
    # learns more from many small steps, at a larger rate and mostly from the KL (benchmarks/finetune.md).
    exec "$PYTHON" "$ROOT/lora_ft_vib.py" --do_train \
        --model_name_or_path "$ROOT/mistral_saves_tva/mini_mistral" \
        --mask_loc "$ROOT/mistral_saves_tva/mask_info_25.5535406026844.pkl" \
        --output_dir out/mini_mistral_tuned --overwrite_output_dir \
        --dataset_name python_docs --block_size 256 --ctx_length 256 \
        --max_train_samples 3000 --num_train_epochs 1 --max_eval_samples 256 \
        --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --learning_rate 1e-3 --lora_dropout 0 \
        --distill_ce_loss_alpha 20 --distill_temp 2 --eval_steps 0.25 --save_steps 0.25 \
        "$@"
fi

MODEL=$1      # checkpoint folder or hub id
SAVE_MODEL=$2 # output folder: SAVE_MODEL/adapter, SAVE_MODEL/merged, results.json
PATH_MASK=$3  # mask_info_<perplexity>.pkl

exec "$PYTHON" "$ROOT/lora_ft_vib.py" --do_train \
    --model_name_or_path "$MODEL" \
    --output_dir "$SAVE_MODEL" \
    --mask_loc "$PATH_MASK" \
    "${@:4}"
