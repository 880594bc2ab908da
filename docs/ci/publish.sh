#!/bin/sh
# Quantize, judge and publish a model: publish.sh MODEL REPO_ID TEXT CALIB [quantize options]
# A limit that is not kept ends it with exit code 3, before anything is uploaded. Every step goes on where it stopped.
set -eu
model=$1 repo=$2 text=$3 calib=$4
shift 4
out=${repo##*/}

quantkit quantize "$model" -o "$out" --calib "$calib" --quiet "$@"
quantkit verify "$out" --source "$model" --quiet
quantkit eval "$out" --text "$text" --against "$model" --max-ppl-increase 5% --max-kl 0.1 --quiet
quantkit push "$out" "$repo" --quiet
