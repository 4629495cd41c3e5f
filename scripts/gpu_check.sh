#!/usr/bin/env bash
# What a machine with a GPU has to show: updates eager, compiled and captured agree, how fast they are, and a short
# training in two parts that ends with the bits of one in one part. Prints Markdown for docs/benchmarks.md; exit code 0 if all of it holds.
#
#     scripts/gpu_check.sh            # with the interpreter of .venv; PYTHON=... takes another
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "no GPU that PyTorch can use")'

failed=0
ways="eager/float32 captured/float32"
if "$python" -c 'import triton' 2>/dev/null; then
    ways="eager/float32 compiled/float32 captured/float32 eager/bfloat16 compiled/bfloat16 captured/bfloat16"
else
    echo "no triton: not compiled"
fi
for batch in 256 4096; do
    # shellcheck disable=SC2086
    "$python" scripts/bench_update.py --device cuda --batch-size $batch --ways $ways || failed=1
    echo
done
"$python" scripts/bench_update.py --device cuda --ways eager/float32 --rounds 1 --profile || failed=1

echo
echo "a training on the GPU, captured, in two halves, the second by resuming, against one in one go:"
train=("$python" -m ctrlrl train sac --env Pendulum-v1 --device cuda --agent.execution captured --seed 1
    --learning-starts 500 --eval-every 0 --no-video --checkpoint-every 1000)
"${train[@]}" --steps 1000 --out "$out/halves" >"$out/log" 2>&1 || { cat "$out/log"; failed=1; }
"$python" -m ctrlrl resume "$out/halves" --steps 2000 >>"$out/log" 2>&1 || { cat "$out/log"; failed=1; }
"${train[@]}" --steps 2000 --out "$out/whole" >"$out/log" 2>&1 || { cat "$out/log"; failed=1; }
"$python" - "$out/halves" "$out/whole" <<'PY' || failed=1
import sys

import torch

import ctrlrl

a, b = (ctrlrl.load(path, checkpoint="last").policy.state_dict() for path in sys.argv[1:])
apart = max(float((a[k] - b[k]).abs().max()) for k in a)
print("the same bits" if apart == 0 else f"not the same bits: weights differ by up to {apart:.1e}")
sys.exit(apart > 0)
PY
exit $failed
