#!/usr/bin/env bash
# All GPU measurements, from a bare checkout, with the machine's own PyTorch and no Ray.
#
#     tests/benchmarks/gpu.sh OUT [PART ...]
#
# OUT receives one JSON and one table per measurement. PARTs, each some minutes: attention presets
# compiled schedulers backbones opencut; all of them by default. Each preset is run on its own, so
# that one which fails (too little memory, a kernel that is missing) costs itself alone.
#
# REHEARSE=1 runs the same commands on a CPU, with the miniature for every preset and as little of
# everything as can be: it shows that they work, and its figures mean nothing.
#
# Needs on the machine: Python 3.11 or newer, PyTorch with CUDA, transformers, numpy, scipy, pyarrow,
# fsspec, pillow, pyyaml, safetensors, timm. What else is needed is taken from a folder of wheels,
# where there is no network:
#
#     pip download --no-deps --only-binary=:all: -c constraints.txt -d wheels diffusers ftfy wcwidth \
#         open_clip_torch pydantic pydantic_core annotated-types typing-inspection \
#         importlib_metadata zipp
#     WHEELS=wheels tests/benchmarks/gpu.sh OUT
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=$(realpath -m "${1:?usage: gpu.sh OUT [PART ...]}")
shift
PARTS=("$@")
[ ${#PARTS[@]} -gt 0 ] || PARTS=(attention presets compiled schedulers backbones opencut)
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
DEVICE=cuda ATTENTION=(--captions 8 --repeats 20) OPENCUT=(--grids 28 60 --graphs 16 --threads 8)
BENCH=()
if [ -n "${REHEARSE:-}" ]; then
    DEVICE=cpu ATTENTION=(--captions 1 --repeats 1) OPENCUT=(--grids 14 --graphs 2)
    BENCH=(device=cpu preset=miniature "batch_sizes=[1]" steps=2 batches=1 repeats=1)
fi

SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
ln -s "$PWD/inference/ovref_inference" "$PWD/pipelines/ovref_miniature" "$SITE"
if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl ||
        exit 1
fi
export PYTHONPATH="$PWD:$SITE" PYTHONUNBUFFERED=1

failed=0
bench() { # name, settings...
    local name=$1
    shift
    echo "== $name"
    "$PYTHON" tests/benchmarks/run_bench.py "$@" "${BENCH[@]}" "output=$OUT/$name.json" | tee "$OUT/$name.md" ||
        failed=1
}

for part in "${PARTS[@]}"; do
    case $part in
    attention) # ways to read attention, on layers of full size
        for dtype in bfloat16 float32; do
            "$PYTHON" tests/benchmarks/attention.py --device "$DEVICE" --dtype "$dtype" \
                "${ATTENTION[@]}" --output "$OUT/attention_$dtype" || failed=1
        done ;;
    presets) # parts, attribution and share of the ceiling, not compiled, then fp32
        bench sd15 preset=sd15 dtype=bfloat16 "batch_sizes=[4,8,16,32]" batches=2
        bench sd21 preset=sd21 dtype=bfloat16 "batch_sizes=[8,16,32]" batches=2
        bench sdxl preset=sdxl dtype=bfloat16 "batch_sizes=[4,8]" batches=1 steps=30
        bench sd21_float32 preset=sd21 dtype=float32 "batch_sizes=[8]" batches=1 ;;
    compiled) # each option beside the plain run of `presets`
        bench sd21_channels_last preset=sd21 dtype=bfloat16 "batch_sizes=[16]" channels_last=true
        bench sd21_fused preset=sd21 dtype=bfloat16 "batch_sizes=[16]" fused_projections=true
        bench sd21_compiled preset=sd21 dtype=bfloat16 "batch_sizes=[16,32]" compiled=true
        bench sd21_graphs preset=sd21 dtype=bfloat16 "batch_sizes=[1,16]" compiled=true \
            cuda_graphs=true
        bench sd21_all preset=sd21 dtype=bfloat16 "batch_sizes=[16,32]" compiled=true \
            channels_last=true fused_projections=true
        bench sd15_all preset=sd15 dtype=bfloat16 "batch_sizes=[16,32]" compiled=true \
            channels_last=true fused_projections=true
        bench sdxl_all preset=sdxl dtype=bfloat16 "batch_sizes=[8]" batches=1 steps=30 \
            compiled=true channels_last=true fused_projections=true ;;
    schedulers) # the fast preset's steps, and what schedulers cost
        bench sd21_fast preset=sd21 dtype=bfloat16 "batch_sizes=[16]" steps=10 guided_share=0.5 \
            compiled=true channels_last=true "schedulers=[unipc]"
        bench sd21_schedulers preset=sd21 dtype=bfloat16 "batch_sizes=[16]" steps=10 \
            "schedulers=[ddim,dpm_solver++,unipc,euler,lcm]" batches=1 ;;
    backbones) # DINOv2, CLIP, GroundingDINO and SAM; drawing is the miniature's, for speed
        bench backbones dtype=bfloat16 "batch_sizes=[16]" steps=2 backbones=true batches=1
        bench backbones_float32 dtype=float32 "batch_sizes=[8]" steps=2 backbones=true batches=1 ;;
    opencut)
        "$PYTHON" tests/benchmarks/opencut.py --device "$DEVICE" "${OPENCUT[@]}" \
            --output "$OUT/opencut" || failed=1 ;;
    *)
        echo "no part $part" >&2
        failed=1 ;;
    esac
done
exit $failed
