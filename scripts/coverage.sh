#!/usr/bin/env bash
# Runs test.sh (words are passed on; all tests with --all) and says which lines of the packages no test
# ran, also in the processes that tests start: a table, and the page build/coverage/index.html.
set -euo pipefail
cd "$(dirname "$0")/.."

rm -f .coverage .coverage.*
status=0
GENGRAM_RUNNER="-m coverage run" bash scripts/test.sh "$@" || status=$?
source scripts/environment.sh
python -m coverage combine --quiet
python -m coverage report --skip-covered --sort=cover
python -m coverage html --quiet --directory build/coverage
exit "$status"
