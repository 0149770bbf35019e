# Sourced by the other scripts: moves to the checkout and enters a virtual environment that has the
# package, all it needs, and the tools of its tests.
#
# The environment is .venv, or the folder that GENGRAM_VENV names. It is made once and made anew
# when setup.py or constraints.txt change. A Python whose torch already sees a GPU keeps that torch.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*"; }

find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "scripts: no Python 3.11 or newer was found; install one and start again" >&2
  return 1
}

make_environment() { # folder
  local python pip options=() constraints=constraints.txt
  python=$(find_python)
  if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    options=(--system-site-packages)
    constraints=$(mktemp)
    grep -v '^torch==' constraints.txt >"$constraints"
  fi
  "$python" -m venv "${options[@]}" "$1"
  # torch first and pinned: a range would take the newest build, of several gigabytes.
  pip=("$1/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints")
  "${pip[@]}" torch numpy
  "${pip[@]}" -e ".[test]"
  # Its set-up looks for torch, which an isolated build would lack.
  "${pip[@]}" setuptools wheel
  "${pip[@]}" --no-build-isolation deepspeed
}

enter_environment() {
  local folder=${GENGRAM_VENV:-.venv} wanted
  wanted=$(cat setup.py constraints.txt | cksum)
  if [ "$(cat "$folder/.gengram" 2>/dev/null)" != "$wanted" ]; then
    say "making the environment in $folder (once; a few minutes)"
    make_environment "$folder"
    echo "$wanted" >"$folder/.gengram"
  fi
  # shellcheck disable=SC1091
  source "$folder/bin/activate"
}

enter_environment
