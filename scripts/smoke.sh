#!/usr/bin/env bash
# From a bare checkout to a trained model, in ten minutes on two CPU cores:
#
#   bash scripts/smoke.sh [KEY=VALUE ...]
#
# makes the environment, builds the data set from the DNA in sample_data, trains a small Genos-like
# mixture of experts with Gengram memory (four CPU processes, TP 2 x PP 2; one process where there
# is a GPU), checks that a run cut in the middle goes on bit for bit, trains the same model without
# Gengram, and compares both with Markov models. Words go to both trainings: train.steps=20
set -euo pipefail
source "$(dirname "$0")/environment.sh"

began=$SECONDS
run=runs/smoke/$(date +%Y%m%d-%H%M%S)
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  config=configs/smoke/one_gpu.yaml
  train=(gengram train "$config")
else
  config=configs/smoke/cpu.yaml
  train=(env OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 -m gengram_megatron train "$config")
fi

say "data set from sample_data"
gengram-data build configs/data/sample.yaml

say "training with Gengram"
"${train[@]}" run.dir="$run/gengram" "$@"

say "resuming a copy of that run from its checkpoint in the middle"
middle=$(python benchmarks/smoke_report.py middle "$run/gengram")
mkdir -p "$run/resumed/checkpoints"
cp -r "$run/gengram/checkpoints/$middle" "$run/resumed/checkpoints/"
stop=$((10#${middle#step_} + 10))
"${train[@]}" run.dir="$run/resumed" "$@" train.stop_at=$stop train.validation_samples=8

say "training without Gengram"
# In one process: every layout gives the same answer, and on two cores this one is the fastest.
gengram train "$config" parallel.tensor=1 parallel.pipeline=1 model.gengram.enabled=false \
  run.dir="$run/without" "$@"

say "result"
python benchmarks/smoke_report.py result "$run" datasets/sample
printf '\n%d minutes %d seconds, the environment not counted\n' \
  $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60))
