#!/usr/bin/env bash
# All GPU measurements, from a bare checkout, with the machine's own PyTorch and no Ray.
#
#     tests/benchmarks/gpu.sh OUT [PART ...]
#
# OUT receives a JSON file per measurement, written after each figure. PARTs, in the order in which
# they run by default: warm works wait generation compiled daam fast sdxl backbones opencut
# windows attention faiss. Each has a time limit of its own and costs itself alone. `warm` fills the
# compiler's cache in the background while `works` runs, whose times do not matter; `wait` waits.
#
# REHEARSE=1 runs the same commands on a CPU, with the miniature for every preset and as little of
# everything as can be: it shows that they work, and its figures mean nothing.
#
# Needs on the machine: Python 3.11 or newer, PyTorch with CUDA, transformers, numpy, scipy, pyarrow,
# fsspec, pillow, pyyaml, safetensors, timm. What else is needed is taken from a folder of wheels,
# where there is no network:
#
#     pip download --no-deps --only-binary=:all: -c constraints.txt -d wheels diffusers ftfy wcwidth \
#         open_clip_torch pydantic pydantic_core annotated-types typing-inspection importlib_metadata \
#         segment-anything
#     WHEELS=wheels tests/benchmarks/gpu.sh OUT
#
# `daam` runs in an environment of its own, a folder DAAM_SITE that is made as daam_gpu.py says, and
# `faiss` with a folder FAISS_SITE that holds faiss-gpu; without the folder either part is left out.
# `windows` takes faiss from there, too. WAYS names the variants that `warm` compiles and `ways`
# measures: three compiled at the same time took 290 s on 16 cores, so choose one or two.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=$(realpath -m "${1:?usage: gpu.sh OUT [PART ...]}")
shift
PARTS=("$@")
[ ${#PARTS[@]} -gt 0 ] || PARTS=(warm works wait compiled ways fast joint sdxl generation daam backbones
    opencut windows attention faiss)
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
DEVICE=(--device cuda) GENERATION=() WORKS=(--steps 20) ATTENTION=(--captions 16 --repeats 10)
JOINT=(--preset sd35_medium --scheduler flow_euler --guidance 4.5 --read-all)
BLOCKS=(--dtype bfloat16 --rows 8 --blocks 4 --repeats 10)
OPENCUT=(--grids 60 --graphs 16) WINDOWS=() DAAM=(--images 3) FAISS=(--cpu-rows 262144 --cpu-steps 4)
WAYS=${WAYS:-graphs:16 compiled:32 all:16}
BACKBONES=() FAST=(--scheduler unipc --steps 10 --guided-share 0.5)
if [ -n "${REHEARSE:-}" ]; then
    DEVICE=(--device cpu)
    GENERATION=(--preset miniature --steps 2 --turns 1)
    WORKS=(--preset miniature --steps 1 --batch 2)
    ATTENTION=(--captions 1 --repeats 1)
    JOINT=() BLOCKS=(--blocks 1 --pixels 256 --repeats 1)
    OPENCUT=(--grids 14 --graphs 2) WINDOWS=(--small) DAAM=(--small --images 1 --steps 1)
    FAISS=(--rows 20000)
    BACKBONES=(--batch 1 --repeats 1 --only clip_large)
fi

SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
ln -s "$PWD/inference/ovref_inference" "$PWD/pipelines/ovref_miniature" "$SITE"
if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl ||
        exit 1
fi
export PYTHONUNBUFFERED=1
OURS=$PWD:$SITE failed=0

part() { # seconds at most, script, arguments...
    local seconds=$1 started=$SECONDS
    shift
    [ -z "${REHEARSE:-}" ] || seconds=$((10 * seconds)) # a CPU that others use, too
    echo "== $*"
    PYTHONPATH=${SITE_OF_PART:-$OURS} timeout -k 5 "$seconds" "$PYTHON" "$@" ||
        { echo "failed: $?"; failed=1; }
    echo "-- $((SECONDS - started)) s"
}
generation() { # seconds at most, name of the file, arguments...
    local seconds=$1 name=$2
    shift 2
    part "$seconds" tests/benchmarks/gpu_generation.py --output "$OUT" --name "$name" "$@" \
        "${DEVICE[@]}" "${GENERATION[@]}"
}

for part in "${PARTS[@]}"; do
    case $part in
    warm) # that of `fast` serves `compiled`, too
        generation 300 warm compiled:16 --compile-only "${FAST[@]}" &> "$OUT/warm_fast.log" &
        for variant in $WAYS; do
            generation 300 warm "$variant" --compile-only &> "$OUT/warm_${variant/:/_}.log" &
        done ;;
    works) part 150 tests/benchmarks/gpu_works.py --output "$OUT" "${DEVICE[@]}" "${WORKS[@]}" ;;
    wait)
        wait
        tail -n 3 "$OUT"/warm_*.log ;;
    compiled)
        generation 150 compiled compiled:16 --worker compiled:16 --profile compiled:16 ;;
    ways) # what else may bring it nearer to the ceiling
        for variant in $WAYS; do
            generation 100 "${variant/:/_}" "$variant" --profile all:16
        done ;;
    generation) generation 150 generation plain:16 plain:32 channels_last:16 --parts plain:16 ;;
    daam)
        if [ -n "${DAAM_SITE:-}" ]; then
            part 30 tests/benchmarks/daam_gpu.py --prepare "$SITE/daam_model"
            SITE_OF_PART=$DAAM_SITE part 75 tests/benchmarks/daam_gpu.py --run "$SITE/daam_model" \
                --output "$OUT/daam.json" "${DEVICE[@]}" "${DAAM[@]}"
        fi ;;
    fast) # the fast preset's way: a few steps, half of them guided
        generation 120 fast compiled:16 "${FAST[@]}" --parts compiled:16 --worker compiled:16 \
            --batches 8 ;;
    joint) # attention over image and text together
        part 60 tests/benchmarks/transformer_attribution.py --output "$OUT/joint_blocks.json" \
            "${DEVICE[@]}" "${BLOCKS[@]}"
        generation 150 joint plain:4 --steps 28 --turns 1 "${JOINT[@]}" ;;
    sdxl) generation 120 sdxl plain:4 --preset sdxl --steps 30 --turns 1 ;;
    backbones)
        part 90 tests/benchmarks/gpu_backbones.py --output "$OUT" "${DEVICE[@]}" "${BACKBONES[@]}" ;;
    opencut)
        part 90 tests/benchmarks/opencut.py --output "$OUT" "${DEVICE[@]}" "${OPENCUT[@]}" ;;
    windows) # clusters on the CPU with faiss
        SITE_OF_PART=$OURS${FAISS_SITE:+:$FAISS_SITE} part 90 \
            tests/benchmarks/segment_windows.py --output "$OUT" "${DEVICE[@]}" "${WINDOWS[@]}" ;;
    attention) # ways to read attention, on layers of full size
        part 60 tests/benchmarks/attention.py --dtype bfloat16 --output "$OUT" "${DEVICE[@]}" \
            "${ATTENTION[@]}" ;;
    faiss)
        if [ -n "${FAISS_SITE:-}" ]; then
            SITE_OF_PART=$PWD:$PWD/inference:$FAISS_SITE OMP_NUM_THREADS=$(nproc) OPENBLAS_NUM_THREADS=$(nproc) \
                part 120 tests/benchmarks/faiss_gpu.py --output "$OUT" "${DEVICE[@]}" "${FAISS[@]}"
        fi ;;
    *)
        echo "no part $part" >&2
        failed=1 ;;
    esac
done
exit $failed
