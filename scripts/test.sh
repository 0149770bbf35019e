#!/usr/bin/env bash
# Environment, install, style, types, and tests: what a change usually breaks, in about ten minutes on
# two cores; with --all everything. Words are passed on to pytest: test.sh -k layouts
set -euo pipefail
source "$(dirname "$0")/environment.sh"

if ! python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("deepspeed"))'; then
  say "DeepSpeed, for its tests"
  # Its set-up looks for torch, which an isolated build would lack. Without the other constraints:
  # a GPU machine keeps its own torch.
  pip=(python -m pip install --quiet --disable-pip-version-check)
  "${pip[@]}" setuptools wheel
  "${pip[@]}" --no-build-isolation "$(grep '^deepspeed==' constraints.txt)"
fi

say "style and types"
ruff format --check .
ruff check .
mypy

say "tests"
# Many small processes on few cores: threads of their own would only be in each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Two files at a time, in the order of tests/conftest.py: most of them use one core, and wait much.
# shellcheck disable=SC2086 # several words
python ${GENGRAM_RUNNER:-} -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=25 "$@"
