#!/usr/bin/env bash
# All that a GPU is wanted for, in one go: 14 minutes on one H200. Needs no network.
#
#   bash benchmarks/gpu.sh [--minutes M] [--out FOLDER] [--work FOLDER] [--data ROOT] [--wheels FOLDER] [--seeds N] [--smoke]
#   bash benchmarks/gpu.sh --pack FOLDER
#
# Parts, each in its share of the time; a part that fails or runs out of time does not keep the later ones from running:
#
#   data    from the start, behind the others      ogbench/scene-play, made on all but four cores (45 % of the time at most)
#   rates   25 %   throughput.py --on-gpu          the GPU's column: updates per second, one and several seeds
#   peers   10 %   peers.py --here                 beside SBX and d3rlpy, those of them that this Python has
#   cells   the rest                               gpu_parts.py cells: OGBench's scene tasks 1 and 4, six methods, 50,000
#                                                  updates and then more; --seeds of them (2) side by side in one program
#   report  the last 40 seconds
#
# What is finished is kept at once. WORK (build/gpu) holds the data, the runs and their checkpoints: the same command goes
# on from there, and finished rows and cells are not made again. OUT ($OUT, else WORK/out) gets four files: `results.tar.gz`
# with rates, peers and the suites' rows and reports, `log.txt`, `logs.tar.gz`, `machine.txt`. Where a command may last 10
# minutes only, give it twice, --minutes 9 and --minutes 5, while the machine keeps WORK.
# Rows go into the checkout with `python benchmarks/gpu_parts.py take FOLDER/suites`, rates and peers by copying.
#
# The data. The published set is 1,000 episodes of 1,000 steps and 180 MB of numbers, about an hour of one core: at
# 340 steps a second and core, 12 cores make it in 270 s. So it is made there, by the same generator and seeds as
# anywhere, while the GPU measures rates. If the time is over before, the set has the episodes that are there by then; the
# cells then are those of the suite `ogbench_part`, which says so and has no published figures beside it. --data ROOT takes
# a set that was made before (ROOT/ogbench/scene-play-v0) and makes none.
#
# Packages. Python 3.11 or newer with jax (CUDA), flax, optax, orbax-checkpoint, h5py, scipy, matplotlib, rich. The others
# are taken from wheels: --pack FOLDER downloads them for Python 3.12 where there is a network (constraints.txt has the
# versions), without what they need for robots that are not ours: 54 MB. --wheels FOLDER (build/wheels) uses them.
#
# --smoke runs all of it in tiny sizes, on a CPU too, in about two minutes.
set -u
cd "$(dirname "$0")/.." || exit 1

minutes=14 out="${OUT:-}" work=build/gpu data="" wheels=build/wheels seeds=2 smoke="" pack=""
usage() { sed -n 's/^# \{0,1\}//; 2,6p' "$0" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    --smoke) smoke=--smoke; shift; continue ;;
    --minutes | --out | --work | --data | --wheels | --seeds | --pack) [ $# -gt 1 ] || usage ;;
    *) echo "gpu.sh: unknown argument $1" >&2; usage ;;
  esac
  case "$1" in
    --minutes) minutes=$2 ;; --out) out=$2 ;; --work) work=$2 ;; --data) data=$2 ;;
    --wheels) wheels=$2 ;; --seeds) seeds=$2 ;; --pack) pack=$2 ;;
  esac
  shift 2
done
python=${PYTHON:-python3}

if [ -n "$pack" ]; then
  names="gymnasium mujoco gymnasium-robotics minari tyro docstring_parser typeguard Farama-Notifications pettingzoo
    platformdirs glfw PyOpenGL ogbench dm_control dm-env dm-tree orbax-checkpoint ImageIO cloudpickle filelock"
  pins=()
  for name in $names; do
    pin=$(grep -i "^$name==" constraints.txt) || { echo "gpu.sh: constraints.txt has no $name" >&2; exit 1; }
    pins+=("$pin")
  done
  platforms=()
  for p in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${p}_x86_64"); done
  mkdir -p "$pack" && "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 -d "$pack" "${pins[@]}" \
    sbx-rl stable-baselines3 tfp-nightly decorator gast six || exit 1
  "$python" - "$pack" <<'PY' || exit 1
import sys, zipfile
from pathlib import Path

LEFT_OUT = {
    "dm_control": ("dm_control/locomotion/", "dm_control/suite/", "dm_control/mujoco/testing/", "dm_control/blender/"),
    "gymnasium_robotics": ("gymnasium_robotics/envs/assets/",),
}
KEPT = "gymnasium_robotics/envs/assets/adroit_hand/"
for wheel in Path(sys.argv[1]).glob("*.whl"):
    if not (without := LEFT_OUT.get(wheel.name.split("-")[0])):
        continue
    part = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            if not item.filename.startswith(without) or item.filename.startswith(KEPT):
                new.writestr(item, old.read(item.filename))
    part.replace(wheel)
PY
  du -sh "$pack"
  exit
fi

case "$minutes" in '' | *[!0-9]*) echo "gpu.sh: --minutes takes a whole number, not $minutes" >&2; exit 2 ;; esac
case "$seeds" in '' | *[!0-9]* | 0) echo "gpu.sh: --seeds takes a number of at least 1, not $seeds" >&2; exit 2 ;; esac
begin=$SECONDS total=$((minutes * 60)) cores=$(env -u OMP_NUM_THREADS nproc)
[ -n "$smoke" ] && work="$work-smoke"
out=${out:-$work/out}
mkdir -p "$work" "$out" || exit 1
work=$(cd "$work" && pwd) out=$(cd "$out" && pwd)
if ls "$wheels"/*.whl >/dev/null 2>&1 && [ ! -d "$work/site" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site.part" "$wheels"/*.whl \
    && mv "$work/site.part" "$work/site"
fi
export PYTHONPATH="$PWD:$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 O2O_CACHE="$work/cache"
export MUJOCO_GL="${MUJOCO_GL:-disabled}" # nothing is drawn
export XLA_PYTHON_CLIENT_PREALLOCATE=false # several processes share the GPU
[ -n "$smoke" ] && export XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=0" JAX_ENABLE_COMPILATION_CACHE=true
exec > >(tee -a "$out/log.txt") 2>&1

finish() { # also when the script is ended
  [ -n "${maker:-}" ] && kill "$maker" 2>/dev/null
  tar -C "$work/results" --exclude runs --exclude logs -czf "$out/results.tar.gz" . 2>/dev/null
  [ -d "$work/results/suites/logs" ] && tar -C "$work/results/suites" -czf "$out/logs.tar.gz" logs
  say "done: $(ls "$out" | tr '\n' ' ')"
}
trap finish EXIT
trap 'exit 1' INT TERM HUP
left() { echo $((total - (SECONDS - begin))); }
say() { echo "== $((SECONDS - begin)) s: $*"; }
part() { # NAME SECONDS COMMAND...: no longer than so many seconds, whatever comes of it
  local name=$1 most=$2
  shift 2
  say "$name, at most $most s"
  timeout -k 20 -s INT "$most" "$@"
  say "$name ended ($?)"
}

{ nvidia-smi; echo "$cores cores"; free -g; "$python" -V; "$python" -m pip list; } >"$out/machine.txt" 2>&1
say "$cores cores; $("$python" -c 'import jax; print(jax.__version__, jax.devices())' 2>&1 | tail -1)"
root=${data:-$work/data}
processes=$((cores > 5 ? cores - 4 : 1))
if [ -n "$data" ] && [ ! -d "$data/ogbench/scene-play-v0" ]; then
  echo "gpu.sh: $data has no ogbench/scene-play-v0" >&2
  root=$work/data
fi
nice -n 10 "$python" benchmarks/gpu_parts.py data --root "$root" --seconds $((total * 45 / 100)) \
  --processes "$processes" $smoke &
maker=$!

together=$((cores > 11 ? 5 : 1))
if [ -n "$smoke" ]; then
  part rates $((total * 30 / 100)) "$python" benchmarks/throughput.py --smoke --out "$work/results/rates" 'iql/pen/1/offline'
else
  part rates $((total * 25 / 100)) "$python" benchmarks/throughput.py --on-gpu --together $together --out "$work/results/rates"
fi
[ -f "$work/results/peers/rounds.csv" ] ||
  part peers $((total * 10 / 100)) "$python" benchmarks/peers.py $smoke --here --out "$work/results/peers" iql sac-utd1
say "waiting for the data"
wait $maker
say "the data ended ($?)"
seconds=$(($(left) - 40))
if [ "$seconds" -gt 60 ]; then
  # by itself it ends in time; the outer limit is for what hangs
  part cells $((seconds + 10)) "$python" benchmarks/gpu_parts.py cells --root "$root" --out "$work/results/suites" \
    --seconds "$seconds" --seeds "$seeds" --workers $((cores > 11 ? 8 : cores > 1 ? 2 : 1)) $smoke
fi
part report 30 "$python" benchmarks/gpu_parts.py report --out "$work/results/suites" --seeds "$seeds" $smoke
