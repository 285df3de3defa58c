#!/usr/bin/env bash
# From a bare machine with Python 3.11 to a trained model: makes .venv, makes a tiny model that can almost add,
# trains it with GRPO until it can, evaluates it on held-out additions, and says where everything is.
#   bash scripts/quickstart.sh [--engine transformers|vllm] [--run DIR]
set -euo pipefail
cd "$(dirname "$0")/.."

engine=transformers run=
while [ $# -gt 0 ]; do
  case $1 in
    --engine) engine=${2:?--engine needs a name}; shift 2 ;;
    --run) run=${2:?--run needs a folder}; shift 2 ;;
    *) echo "quickstart: unknown argument '$1'; usage: bash scripts/quickstart.sh [--engine transformers|vllm] [--run DIR]" >&2; exit 2 ;;
  esac
done
case $engine in
  transformers) lock=run ;;
  vllm) lock=test ;;
  *) echo "quickstart: no engine '$engine'; choose transformers or vllm" >&2; exit 2 ;;
esac

number=1
while [ -z "$run" ]; do
  [ -e "runs/quickstart-$engine-$number" ] || run=runs/quickstart-$engine-$number
  number=$((number + 1))
done

bash scripts/setup.sh "$lock"
export PATH=$PWD/.venv/bin:$PATH TOKENIZERS_PARALLELISM=false
rltrain tiny-model --out .cache/tiny-model
rltrain train recipes/policy/grpo.yaml --profile tiny_cpu --engine "$engine" --run "$run"
rltrain eval "$run/model" --recipe "$run/recipe.resolved.yaml"
