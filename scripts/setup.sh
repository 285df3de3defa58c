#!/usr/bin/env bash
# Makes .venv with the tested versions: `bash scripts/setup.sh run` to train, `bash scripts/setup.sh test` for everything.
# Linux wheels of torch on PyPI are CUDA builds: point PIP_EXTRA_INDEX_URL at PyTorch's CPU index for the small one.
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:-run}
torch=torch==2.13.0
lock=requirements/$what.txt
[ -f "$lock" ] || { echo "setup: no $lock; say run or test" >&2; exit 2; }

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "setup: $("$python" --version 2>&1) is too old; Python 3.11 or newer is needed (name one with PYTHON=...)" >&2
  exit 2
}

stamp() { cat "requirements/$1.txt" pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1; }
for made in "$what" test; do # a test environment holds everything that a run environment does
  if [ "$(cat ".venv/setup-$made" 2>/dev/null)" = "$(stamp "$made")" ]; then exit 0; fi
done

echo "setup: making .venv from $lock"
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check "$torch"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r "$lock"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
stamp "$what" > ".venv/setup-$what"
