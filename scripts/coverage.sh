#!/usr/bin/env bash
# Runs the tests (words are passed on to pytest, as in test.sh; all of them with --all) and says which
# lines of the packages no test ran, also in the processes that tests start: a table, and the page
# build/coverage/index.html.
set -euo pipefail
source "$(dirname "$0")/environment.sh"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
rm -f .coverage .coverage.*
status=0
python -m coverage run -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@" || status=$?
python -m coverage combine --quiet
python -m coverage report --skip-covered --sort=cover
python -m coverage html --quiet --directory build/coverage
exit "$status"
