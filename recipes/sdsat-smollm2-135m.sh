#!/usr/bin/env bash
# An SDSAT drafter for smollm2-135m from answers of the model, made by recipes/smollm2-135m.sh or `s4c distill`.
#
#     recipes/sdsat-smollm2-135m.sh ANSWERS.jsonl [MORE.jsonl ...]
#
# Started again, it goes on where it stopped. docs/SDSAT.md says what comes of how many steps.
set -euo pipefail

folder=${FOLDER:-runs/sdsat-smollm2-135m}
target=${TARGET:-smollm2-135m}
data=()
for answers in "$@"; do data+=(--data "$answers"); done

resume=()
[ -d "$folder/steps" ] && resume=(--resume)
s4c train --method sdsat --target "$target" --runtime torch --dtype bfloat16 --autocast bfloat16 "${data[@]}" \
    --out "$folder" --set tokens=4 --set rank=16 --set groups=32 --batch-tokens 1024 --learning-rate 2e-3 \
    --warmup-steps 30 --held-out 0.02 --validation-rows 16 --eval-every 200 --save-every 100 \
    --max-seconds "${SECONDS_TO_TRAIN:-2400}" "${resume[@]}"
