#!/usr/bin/env bash
# From a bare machine with Python 3.11 to a trained model: makes .venv, writes the pretrained SmolLM2-135M-Instruct to a folder,
# trains it with GRPO on sums of one-digit numbers, evaluates it on held-out sums and prints its answers beside those before.
#   bash scripts/quickstart.sh [--engine transformers|vllm] [--model smollm2|tiny] [--run DIR]
# --model tiny: a model of a million parameters that this script makes, in three minutes with set-up.
set -euo pipefail
cd "$(dirname "$0")/.."

engine=transformers model=smollm2 run=
while [ $# -gt 0 ]; do
  case $1 in
    --engine) engine=${2:?--engine needs a name}; shift 2 ;;
    --model) model=${2:?--model needs a name}; shift 2 ;;
    --run) run=${2:?--run needs a folder}; shift 2 ;;
    *) echo "quickstart: unknown argument '$1'; usage: bash scripts/quickstart.sh [--engine transformers|vllm] [--model smollm2|tiny] [--run DIR]" >&2; exit 2 ;;
  esac
done
case $engine in
  transformers) lock=run ;;
  vllm) lock=test ;;
  *) echo "quickstart: no engine '$engine'; choose transformers or vllm" >&2; exit 2 ;;
esac
case $model in
  smollm2|tiny) ;;
  *) echo "quickstart: no model '$model'; choose smollm2 or tiny" >&2; exit 2 ;;
esac

number=1
while [ -z "$run" ]; do
  [ -e "runs/quickstart-$engine-$number" ] || run=runs/quickstart-$engine-$number
  number=$((number + 1))
done

bash scripts/setup.sh "$lock"
export PATH=$PWD/.venv/bin:$PATH TOKENIZERS_PARALLELISM=false
if [ "$model" = tiny ]; then
  rltrain tiny-model --out .cache/tiny-model
  rltrain train recipes/policy/grpo.yaml --profile tiny_cpu --engine "$engine" --run "$run"
  rltrain eval "$run/model" --recipe "$run/recipe.resolved.yaml"
  exit
fi
rltrain get-model smollm2 --out .cache/smollm2
rltrain train recipes/policy/sums.yaml --engine "$engine" --run "$run"
rltrain generate "$run/model" --before .cache/smollm2 -n 2 --max-tokens 16 \
  "What is 3 + 6? Answer with the number only." "What is 8 + 5? Answer with the number only." \
  "What is 9 + 9? Answer with the number only."
