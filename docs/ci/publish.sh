#!/bin/sh
# Quantize, judge and publish a model: publish.sh MODEL REPO_ID TEXT CALIB MAX_KL [quantize options]
# MAX_KL: the mean KL divergence from MODEL on TEXT, in nats a token, that is still good enough: 0.1 for small models,
# 0.03 for large ones. One that is not ends it with exit code 3, before anything is uploaded. Run again, it quantizes what
# is left to do, and judges anew.
set -eu
model=$1 repo=$2 text=$3 calib=$4 limit=$5
shift 5
out=${repo##*/}

quantkit quantize "$model" -o "$out" --calib "$calib" "$@"
quantkit verify "$out" --source "$model" --quiet
quantkit eval "$out" --text "$text" --against "$model" --max-kl "$limit" --quiet
quantkit push "$out" "$repo" --quiet
