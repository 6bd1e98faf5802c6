#!/usr/bin/env bash
# The drafter that ships for smollm2-135m, from prompts to package.
#
#     recipes/smollm2-135m.sh PROMPTS.jsonl [FOLDER]
#
# PROMPTS.jsonl holds a prompt a line ({"prompt": "..."}); never measure on questions that stand in it. Two CPU cores
# need about two hours for the text and one for the training. On a GPU set SECONDS_TO_TRAIN higher; everything else
# stays. Each step goes on where it was stopped when the script is started again.
set -euo pipefail

prompts=$1
folder=${2:-runs/smollm2-135m}
target=${TARGET:-smollm2-135m}
seconds=${SECONDS_TO_TRAIN:-3000}
mkdir -p "$folder"

text=(--target "$target" --dtype bfloat16 --max-new-tokens 192 --temperatures 0,0,0.8,1 --batch 64)
s4c distill "${text[@]}" --prompts "$prompts" --out "$folder/answers.jsonl"
s4c distill "${text[@]}" --count 2000 --out "$folder/self-written.jsonl"

resume=()
[ -d "$folder/run/steps" ] && resume=(--resume)
s4c train --method s4c --target "$target" --dtype bfloat16 --autocast bfloat16 \
    --data "$folder/answers.jsonl" --data "$folder/self-written.jsonl" --out "$folder/run" \
    --set draft_vocab=10240 --batch-tokens 2048 --learning-rate 1e-3 --warmup-steps 60 \
    --held-out 0.02 --eval-every 250 --save-every 250 --max-seconds "$seconds" "${resume[@]}"

s4c eval --target "$target" --drafter "$folder/run/best" \
    --data "$folder/answers.jsonl" --data "$folder/self-written.jsonl" --held-out 0.02
echo "to ship it: cp -r $folder/run/best s4c/shipped/smollm2-135m"
