#!/usr/bin/env bash
# What a machine with a GPU has to show: updates eager, compiled and captured agree, how fast they are, simulations on
# it are those of the CPU, how fast they are, and short trainings in two parts that end with the bits of one in one
# part, of robots and of a language model. Prints Markdown for docs/benchmarks.md; exit code 0 if all of it holds.
#
#     scripts/gpu_check.sh                     # with the interpreter of .venv; PYTHON=... takes another
#     scripts/gpu_check.sh updates language    # some parts of: updates simulations halves language quadruped
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "no GPU that PyTorch can use")'

failed=0

updates() { # eager, compiled and captured: that they agree, and how fast they are
    local ways="eager/float32 captured/float32"
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
}

simulations() { # on the GPU against those of the CPU
    echo "simulations on the GPU (envs/warp.py) against those of the CPU:"
    echo
    CTRLRL_TEST_DEVICE=cuda "$python" -m pytest -q -m "" tests/test_sim.py tests/test_warp.py tests/test_backends.py ||
        failed=1
    echo
    "$python" scripts/bench_warp.py --device cuda --num-sims 4096 2>"$out/log" || { tail -20 "$out/log"; failed=1; }
}

# ALGO ENV ...: a training in two halves, the second by resuming, against one in one go; where these differ, one more in
# one go tells whether such trainings repeat themselves at all
halves_equal_whole() {
    local train=("$python" -m ctrlrl train "$1" --env "$2" --device cuda --seed 1 --eval-every 0 --no-video
        --checkpoint-every 1000 "${@:3}")
    local at="$out/$1"
    rm -rf "$at-halves" "$at-whole" "$at-again"
    {
        "${train[@]}" --steps 1000 --out "$at-halves" && "$python" -m ctrlrl resume "$at-halves" --steps 2000 &&
            "${train[@]}" --steps 2000 --out "$at-whole"
    } >"$out/log" 2>&1 || { tail -20 "$out/log"; return 1; }
    apart "$1, $2" "$at-halves" "$at-whole" && return
    "${train[@]}" --steps 2000 --out "$at-again" >"$out/log" 2>&1 || tail -20 "$out/log"
    apart "the same, both in one go" "$at-whole" "$at-again" || true
    return 1
}

apart() { # NAME RUN RUN: how far the weights of two runs are apart; exit code 0 if not at all
    "$python" - "$@" <<'PY'
import sys

import ctrlrl

name, *runs = sys.argv[1:]
a, b = (ctrlrl.load(path, checkpoint="last").policy.state_dict() for path in runs)
apart = max(float((a[k].float() - b[k].float()).abs().max()) for k in a)
print(f"| {name} | " + ("the same bits" if apart == 0 else f"weights differ by up to {apart:.1e}") + " |")
sys.exit(apart > 0)
PY
}

table_of_halves() {
    echo
    echo "trainings on the GPU, $1, in two halves, the second by resuming, against one in one go:"
    echo
    echo "| | |"
    echo "|---|---|"
}

halves() { # of agents that replay a graph
    table_of_halves captured
    local algo captured=(--agent.execution captured)
    for algo in sac redq droq dsac-t td3; do
        halves_equal_whole $algo Pendulum-v1 --learning-starts 900 "${captured[@]}" || failed=1
    done
    halves_equal_whole sac-discrete CartPole-v1 --learning-starts 900 "${captured[@]}" || failed=1
    halves_equal_whole ppo Pendulum-v1 --rollout-steps 600 "${captured[@]}" || failed=1
    halves_equal_whole ppo CartPoleSwingUp-v0 --num-envs 20 --rollout-steps 600 "${captured[@]}" || failed=1
}

language() { # a small language model, that chooses and that writes its answers
    "$python" -m ctrlrl language make-lm --env text/FrozenLake --episodes 20 --epochs 2 --out "$out/chooses" \
        >"$out/log" 2>&1 || { tail -20 "$out/log"; failed=1; return; }
    "$python" -m ctrlrl language make-lm --env text/GuessNumber --env-kwargs '{"free": true}' --episodes 20 --epochs 2 \
        --out "$out/writes" >"$out/log" 2>&1 || { tail -20 "$out/log"; failed=1; return; }
    table_of_halves "of a language model"
    halves_equal_whole ppo text/FrozenLake --language.model "$out/chooses" --num-envs 20 --rollout-steps 200 || failed=1
    halves_equal_whole sac-discrete text/FrozenLake --language.model "$out/chooses" --learning-starts 900 \
        --num-envs 20 --agent.utd 0.05 --agent.entropy-penalty 0 --buffer.hindsight 0.5 || failed=1
    halves_equal_whole ppo text/GuessNumber --env-kwargs '{"free": true}' --language.model "$out/writes" --num-envs 20 \
        --rollout-steps 200 --language.candidate-tokens 4 || failed=1
    halves_equal_whole ppo text/GuessNumber --env-kwargs '{"free": true}' --language.model "$out/writes" --num-envs 20 \
        --rollout-steps 240 --language.candidate-tokens 4 --language.group-size 4 --agent.advantage gigpo || failed=1
}

quadruped() { # 4096 of them, and that no step waits for the GPU
    echo "a quadruped in 4096 simulations on the GPU, and that no step waits for it:"
    echo
    "$python" - <<'PY' || failed=1
import torch

from ctrlrl.envs.make import make_env

env = make_env("Go1VelocityFlat-v0", num_envs=64, device="cuda")
env.reset(0)
action = torch.zeros(64, 12, device="cuda")
for _ in range(3):  # compiles and records
    env.step(action)
torch.cuda.set_sync_debug_mode("error")
for _ in range(10):
    env.step(action)
torch.cuda.set_sync_debug_mode("default")
print("no step waits for the GPU")
PY
    "$python" scripts/profile_loop.py --algo ppo --env Go1VelocityFlat-v0 --steps 20000000 -- \
        --num-envs 4096 --rollout-steps 98304 --agent.minibatch-size 24576 --device cuda || failed=1
}

parts=" updates simulations halves language quadruped "
for part in "$@"; do
    [[ $parts == *" $part "* ]] || { echo "there is no part $part, but:$parts" >&2; exit 2; }
done
# shellcheck disable=SC2086
for part in ${@:-$parts}; do
    "$part"
    echo
done
exit $failed
