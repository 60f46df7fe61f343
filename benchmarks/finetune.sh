#!/usr/bin/env bash
# What each term of fine-tuning's loss is worth at the same budget: the cross-entropy alone, with the KL to the dense
# model, with its hidden states as well; mini Mistral at 50%, its shipped mask, weights folded, three seeds. Some 45
# minutes on two CPU cores; a run that has its results is not repeated. Prints the table of finetune.md.
#   bash benchmarks/finetune.sh [OUTPUT]     default: out/finetune
set -euo pipefail
NEEDS=text
source "$(dirname "$0")/../script/env.sh"
cd "$ROOT"

OUTPUT=${1:-out/finetune}
run() { # NAME SEED FLAG...
    folder="$OUTPUT/$1-$2"
    [ -f "$folder/results.json" ] && return
    "$PYTHON" lora_ft_vib.py --do_train --seed "$2" \
        --model_name_or_path mistral_saves_tva/mini_mistral \
        --mask_loc mistral_saves_tva/mask_info_26.844462387911015.pkl --weight_update fold \
        --dataset_name python_docs --block_size 256 --ctx_length 256 --max_train_samples 2000 --num_train_epochs 1 \
        --max_eval_samples 256 --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --learning_rate 1e-3 \
        --lora_dropout 0 --eval_steps 0.25 --save_steps 0.25 --speed_batches 10 \
        --output_dir "$folder" --overwrite_output_dir "${@:3}"
}
KL="--distill_ce_loss_alpha 20 --distill_temp 2"
for seed in 0 1 2; do
    run kl $seed $KL
    run ce $seed --distill False
done
for seed in 0 1 2; do
    run kl_hidden $seed $KL --distill_hidden_alpha 20
done
"$PYTHON" benchmarks/collect_finetune.py "$OUTPUT"
