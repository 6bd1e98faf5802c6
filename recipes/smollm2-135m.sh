#!/usr/bin/env bash
# A drafter like the one that ships for smollm2-135m, from prompts to package (docs/TRAINING.md has the trainings of that one).
#
#     recipes/smollm2-135m.sh [MORE_PROMPTS.jsonl ...]
#
# The target answers our own prompts (prompts.jsonl and topics.jsonl), those of the files given ({"prompt": "..."} a line; never
# measure on questions that stand in them) and 2,000 prompts that it writes itself. On two CPU cores the text takes
# hours and the training SECONDS_TO_TRAIN; on a GPU train longer. Started again, each step goes on where it stopped.
# START_FROM=CHECKPOINT goes on with the heads of an earlier drafter, which may have fewer layers, and with its draft vocabulary if that has as many tokens.
set -euo pipefail

here=$(dirname "$0")
folder=${FOLDER:-runs/smollm2-135m}
target=${TARGET:-smollm2-135m}
seconds=${SECONDS_TO_TRAIN:-3000}
mkdir -p "$folder"

text=(--target "$target" --dtype bfloat16 --max-new-tokens 192 --temperatures 0,0,0.8,1 --batch 64 --features "$folder/features")
data=()
for prompts in "$here/prompts.jsonl" "$here/topics.jsonl" "$@"; do
    answers="$folder/answers-$(basename "$prompts")"
    s4c distill "${text[@]}" --prompts "$prompts" --out "$answers"
    data+=(--data "$answers")
done
s4c distill "${text[@]}" --count 2000 --out "$folder/self-written.jsonl"
data+=(--data "$folder/self-written.jsonl")

resume=()
[ -d "$folder/run/steps" ] && resume=(--resume)
[ -n "${START_FROM:-}" ] && resume+=(--init "$START_FROM")
s4c train --method s4c --target "$target" --dtype bfloat16 --autocast bfloat16 "${data[@]}" --out "$folder/run" \
    --cache "$folder/features" --set heads=2 --set layers=2 --set draft_vocab=4096 --set sharpness=1.25 --batch-tokens 2048 --step-vocab 2048 --echo-loss \
    --learning-rate 1e-3 --warmup-steps 60 --held-out 0.02 --eval-every 250 --save-every 250 --max-seconds "$seconds" "${resume[@]}"

s4c eval --target "$target" --drafter "$folder/run/best" "${data[@]}" --held-out 0.02
echo "to ship it: cp $folder/run/best/* s4c/shipped/smollm2-135m/"
