#!/usr/bin/env bash
# The other methods on the built-in model: trained on the same answers, and measured beside the shipped drafter.
#
#     recipes/methods.sh ANSWERS.jsonl [QUESTIONS.jsonl]
#
# ANSWERS.jsonl is what `s4c distill` wrote (see smollm2-135m.sh); QUESTIONS.jsonl are Spec-Bench's, which nothing may be
# trained on. Both runs share the features of the target. Started again, each goes on where it stopped. On two CPU cores
# MEDUSA_SECONDS and DRAFT_SECONDS give a first result; on a GPU train longer.
set -euo pipefail

answers=$1
questions=${2:-}
folder=${FOLDER:-runs/methods}
target=${TARGET:-smollm2-135m}

train() {
    local method=$1 seconds=$2
    shift 2
    local resume=()
    [ -d "$folder/$method/steps" ] && resume=(--resume)
    s4c train --method "$method" --target "$target" --dtype bfloat16 --autocast bfloat16 --data "$answers" \
        --out "$folder/$method" --cache "$folder/features" --batch-tokens 2048 --warmup-steps 60 --held-out 0.02 \
        --eval-every 250 --save-every 250 --max-seconds "$seconds" "$@" "${resume[@]}"
}

train medusa "${MEDUSA_SECONDS:-720}" --set draft_vocab=10240 --learning-rate 1e-3
train draft-model "${DRAFT_SECONDS:-1500}" --set layers=4 --set width=256 --set draft_vocab=8192 --learning-rate 2e-3

if [ -n "$questions" ]; then
    for temperature in 0 1; do
        s4c bench --target "$target" --questions "$questions" --sample 60 --temperature "$temperature" \
            --methods "auto,shipped,$folder/medusa/best,$folder/draft-model/best,ngram"
    done
fi
