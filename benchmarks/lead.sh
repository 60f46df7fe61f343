#!/usr/bin/env bash
# Whether the gates' lead lasts after fine-tuning: both miniatures, half gone by gates, Taylor and FLAP, reconstructed,
# then the same LoRA distillation on as many tokens. Test split; masks, updates and checkpoints are chosen on the
# validation split. Some 5 minutes for each line and seed on one CPU core; a run that has its results is not repeated.
# Prints the second table of finetune.md.
#   bash benchmarks/lead.sh [OUTPUT] [SEED ...]     default: out/lead 0 1 2
set -euo pipefail
NEEDS=text
source "$(dirname "$0")/../script/env.sh"
cd "$ROOT"

OUTPUT=${1:-out/lead}
SEEDS=("${@:2}")
if [ ${#SEEDS[@]} -eq 0 ]; then SEEDS=(0 1 2); fi
TEXT=(--dataset_name python_docs --block_size 256 --ctx_length 256 --max_eval_samples 128 --speed_batches 0
    --overwrite_output_dir)
run() { # MODEL METHOD SEED BLOCKS, those that units are chosen by
    local folder="$OUTPUT/${1##*/}-$2-$3"
    if [ -f "$folder/tuned/results.json" ]; then return; fi
    if [ ! -f "$folder/results.json" ]; then
        "$PYTHON" tva_prune.py --model_name_or_path "$1" --prune_method "$2" --seed "$3" --target_sparsity 0.5 \
            "${TEXT[@]}" --max_train_samples "$4" --per_device_train_batch_size 4 --weight_update none \
            --output_dir "$folder"
    fi
    "$PYTHON" lora_ft_vib.py --do_train --model_name_or_path "$1" --plan "$folder/plan.json" --seed "$3" \
        "${TEXT[@]}" --eval_split test --weight_update reconstruct --refit_samples 256 --max_train_samples 1200 \
        --num_train_epochs 1 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --learning_rate 1e-3 \
        --lora_dropout 0 --distill_ce_loss_alpha 20 --distill_temp 2 --eval_steps 0.25 --save_steps 0.25 \
        --output_dir "$folder/tuned"
}
for seed in "${SEEDS[@]}"; do
    for model in mistral_saves_tva/mini_mistral llama3_saves_tva/mini_llama3; do
        run $model vib "$seed" 1200
        run $model taylor_global "$seed" 256
        run $model flap "$seed" 256
    done
done
"$PYTHON" benchmarks/collect_finetune.py "$OUTPUT"
