#!/usr/bin/env bash
# Learned gates against one-shot scores, each folded and refitted, at four sparsities and three seeds. Without
# arguments: both miniature models on the documentation text of this machine. An interrupted comparison goes on where it
# was. Writes compare.md, compare.json and compare.png to out/compare; other flags: tvaprune compare --help.
# Relative paths are below the folder that this is called from.
#   bash script/compare.sh [MODEL] [DATASET] [--FLAG VALUE ...]
set -euo pipefail
NEEDS=text # whatever else is compared on, package_readmes and the offline tasks are too
source "$(dirname "$0")/env.sh"

FLAGS=(--models "$ROOT"/{mistral_saves_tva/mini_mistral,llama3_saves_tva/mini_llama3})
if [ $# -gt 0 ] && [[ $1 != --* ]]; then
    FLAGS=(--models "$1") # checkpoint folder or hub id
    shift
fi
if [ $# -gt 0 ] && [[ $1 != --* ]]; then
    FLAGS+=(--dataset "$1") # python_docs, package_readmes, c4, wikitext2, ptb, or a path
    shift
fi
exec "$PYTHON" -P -m tvaprune compare "${FLAGS[@]}" "$@" # -P: not a tvaprune of the caller's folder
