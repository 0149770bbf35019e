#!/usr/bin/env bash
# What this checkout does on a machine with one GPU, in less than ten minutes, as one JSON file:
#
#   [OUT=FILE] [DATASETS=FOLDER] bash scripts/gpu_check.sh [WHEELS]
#
# The machine has torch and needs no package index: WHEELS is a folder of wheels (megatron-core and
# whatever else is missing; if something is, the script says how to fetch it elsewhere). They go to
# a temporary folder, and so do the runs. The data sets sample and sample_8k are taken from
# DATASETS (default: datasets), or built there from sample_data. OUT is by default
# benchmarks/results/gpu_<device>.json. A step that fails is recorded, and the next one goes on;
# the exit status says whether all succeeded.
#
# REHEARSE=1 goes through the same steps with tiny models on the CPU, to test this script.
set -uo pipefail
wheels=${1:+$(realpath "$1")}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$work/packages:$PWD PYTHONDONTWRITEBYTECODE=1
datasets=${DATASETS:-datasets}

step() { # NAME SECONDS COMMAND ...: its output goes to NAME.log, exit status and time to NAME.status
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  printf '\n== %s\n' "$name"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$work/$name.log"
  status=${PIPESTATUS[0]}
  echo "$status $((SECONDS - began))" >"$work/$name.status"
}

is_built() { [ -f "$datasets/$1/manifest.json" ]; }

data_set() { # NAME SEQ_LENGTH: use the one that is there, or build it
  if is_built "$1"; then
    echo "using $datasets/$1"
  else
    "$python" -c 'from data_prep.cli import main; main()' \
      build configs/data/sample.yaml "seq_length=$2" "output=$datasets/$1"
  fi
}

train() { # RUN CONFIG KEY=VALUE ...
  local run=$1
  shift
  "$python" -m gengram_megatron train "$@" "run.dir=$work/runs/$run"
}

without_gpu() { CUDA_VISIBLE_DEVICES='' "$python" "$@"; }

if [ -n "$wheels" ]; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
    --target "$work/packages" "$wheels"/*.whl || exit
fi
is_built sample && is_built sample_8k && to_build=() || to_build=(xopen)
"$python" scripts/missing_packages.py "${to_build[@]}" || exit
if [ -z "${REHEARSE:-}" ] &&
  ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: torch sees no GPU here; REHEARSE=1 tests the script itself on the CPU" >&2
  exit 2
fi

gpu_tests=(tests/test_gpu.py tests/test_platform.py tests/test_flops.py)
cpu_tests=(tests/test_gengram_module.py tests/test_gengram_pooling.py tests/test_attention.py
  tests/test_experts.py)
long=8192
smoke=()
large=("data.path=$datasets/sample_8k")
if [ -n "${REHEARSE:-}" ]; then
  tiny=(model.hidden_size=32 model.num_layers=2 model.num_attention_heads=4
    model.num_query_groups=2 model.ffn_hidden_size=32 model.gengram.dim=8 train.precision=fp32
    train.validation_samples=2)
  gpu_tests=(tests/test_gpu.py)
  cpu_tests=(tests/test_tokenizer.py)
  long=1024
  smoke=("${tiny[@]}" 'model.gengram.layers=[2]' train.steps=2 train.global_batch_size=2
    train.micro_batch_size=1 train.validation_interval=null checkpoint.interval=null)
  large+=("${tiny[@]}" 'model.gengram.layers=[1,2]' "model.seq_length=$long" train.steps=7
    train.global_batch_size=1)
fi

export -f is_built data_set train without_gpu
export python work datasets
step data_sets 60 bash -c "data_set sample 512 && data_set sample_8k $long"
step gpu_tests 200 "$python" -m pytest -q -p no:cacheprovider "${gpu_tests[@]}"
step cpu_tests 90 bash -c 'without_gpu "$@"' _ -m pytest -q -p no:cacheprovider "${cpu_tests[@]}"
step smoke 100 bash -c 'train "$@"' _ smoke configs/smoke/one_gpu.yaml \
  "data.path=$datasets/sample" "${smoke[@]}"
for memory in true false; do
  step "gengram_$memory" 75 bash -c 'train "$@"' _ "gengram_$memory" \
    configs/smoke/moe_1.2b_8k_one_gpu.yaml "model.gengram.enabled=$memory" "${large[@]}"
done

printf '\n== report\n'
"$python" benchmarks/gpu_report.py "$work" ${OUT:+--out "$OUT"}
