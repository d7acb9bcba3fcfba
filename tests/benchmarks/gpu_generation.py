"""Generation on a GPU at full size: bare and with attribution, in turn, by part, and how optimised.

A variant is a way to run the same pipeline: plain, channels-last, compiled, with CUDA graphs, ...
For each variant and batch size whole batches are generated, from captions to pixels in host
memory, alternately without and with attribution (heatmaps in host memory as well). Optionally
follow: each part alone (`bench`), the worker's whole path through `synthesize` and `embed`
into shards, and a profile of two UNet calls by kind of kernel (what four steps take less what two
take, so that texts and decoding are not in it). The ceiling is the best of ten
products of two random 8192 x 8192 matrices in the same type; bandwidth is a copy of 4 GB, bytes
read and written counted.

    python tests/benchmarks/gpu_generation.py --output OUT plain:16 plain:32 compiled:16

The results are written after each figure, so a run that is cut off leaves what it had.
`--compile-only` runs one short batch of each variant, to fill the compiler's cache on the disk.
"""

import argparse
import hashlib
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench import measure, presets
from bench.limits import BenchSpec, ceiling, operations, seconds
from ovref.models.diffusion import to_uint8
from ovref.models.loading import DTYPES, optimize_pipeline
from ovref.stages.synthesize import SynthesizeStage

VARIANTS = {
    "plain": {},
    "channels_last": {"channels_last": True},
    "fused": {"fused_projections": True},
    "compiled": {"compiled": True},
    "graphs": {"compiled": True, "cuda_graphs": True},
    "all": {"compiled": True, "channels_last": True, "fused_projections": True},
}
"""Name -> arguments of `optimize_pipeline`."""

KINDS = {
    "copy": ("copy", "memcpy", "memset", "catarray", "nchwtonhwc", "nhwctonchw"),
    "normalisation": ("norm", "welford", "rowwisemoments"),
    "compiled pointwise": ("triton_",),
    "attention": ("flash", "fmha", "attention", "sdpa", "sdpfa"),
    "convolution": ("conv", "fprop", "implicit", "winograd"),
    "matrix product": ("gemm", "nvjet", "cutlass", "matmul", "splitk"),
}
"""Kind -> what stands in the names of its kernels; the first that fits, otherwise `pointwise`."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", help="VARIANT:BATCH")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--name", default="generation", help="of the file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="sd21")
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guided-share", type=float, default=1.0)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument(
        "--read-all", action="store_true", help="a transformer's blocks and steps, not its default"
    )
    parser.add_argument("--turns", type=int, default=2, help="batches of each kind")
    parser.add_argument("--parts", nargs="*", default=[], help="variants measured part by part")
    parser.add_argument("--worker", nargs="*", default=[], help="variants run as a worker does")
    parser.add_argument("--batches", type=int, default=3, help="that a worker generates")
    parser.add_argument(
        "--profile", nargs="*", default=[], help="variants whose kernels are listed"
    )
    parser.add_argument("--compile-only", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = DTYPES[arguments.dtype]
    results = {
        "what": f"{arguments.preset}, {arguments.dtype}, {arguments.steps} steps of "
        f"{arguments.scheduler}, guidance {arguments.guidance} in {arguments.guided_share:.0%} of "
        f"them{', attention read in all blocks and steps' if arguments.read_all else ''}",
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "rows": {},
    }
    path = arguments.output / f"{arguments.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def found(where, name, value):
        where[name] = value
        print(f"{name}: {value}", flush=True)
        if not arguments.compile_only:
            path.write_text(json.dumps(results, indent=1) + "\n")

    spec = BenchSpec(
        preset=arguments.preset,
        steps=arguments.steps,
        guidance=arguments.guidance,
        guided_share=arguments.guided_share,
        dtype=arguments.dtype,
    )
    if arguments.read_all:
        every = tuple(range(len(presets.blocks(arguments.preset))))
        spec = replace(spec, blocks=every, read_steps=(0.0, 1.0))
    if not arguments.compile_only:
        found(results, "ceiling", ceiling(dtype, device))
        found(results, "bytes a second", bandwidth(device))
    pipeline, last = None, None
    for named in arguments.variants:
        variant, _, batch = named.partition(":")
        started = time.perf_counter()
        if variant != last:
            del pipeline
            torch.compiler.reset()
            torch.manual_seed(0)
            pipeline = presets.pipeline(arguments.preset, arguments.scheduler, dtype, device)
            options = dict.fromkeys(("compiled", "channels_last", "fused_projections"), False)
            optimize_pipeline(pipeline, **options | VARIANTS[variant])
            last = variant
        if "flops" not in results and not arguments.compile_only:
            found(results, "flops", operations(spec, pipeline))
        row = results["rows"][named] = {}
        try:
            for name, value in measured(spec, pipeline, variant, int(batch), arguments, results):
                found(row, name, value)
        except torch.OutOfMemoryError:
            found(row, "error", "out of memory")
        found(row, "seconds in all", time.perf_counter() - started)


def measured(spec, pipeline, variant, batch_size, arguments, results):
    """Yields names and values of one variant at one batch size."""
    device, named = pipeline.vae.device, f"{variant}:{batch_size}"
    synthesize = spec.synthesis(
        arguments.scheduler, batch_size, compiled=VARIANTS[variant].get("compiled", False)
    )
    prompts = measure._prompts(arguments.batches * batch_size)
    stage = SynthesizeStage(synthesize, synthesize.generator(pipeline))
    given = measure.requested(stage, prompts[:batch_size])

    def bare(generator):
        images = pipeline(
            prompt=given[0],
            num_inference_steps=generator._settings.steps,
            height=synthesize.size_hw[0],
            width=synthesize.size_hw[1],
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in given[2]],
            output_type="pt",
            **generator._recorder.options(given[0], generator._settings),
        ).images
        return to_uint8(images)[0].cpu()

    generator = synthesize.generator(pipeline)
    # Few steps warm up as well as many: one guided and, where some are not, one that is not.
    share = 1.0 if spec.guided_share == 1 else 0.5
    brief = replace(synthesize, steps=2, guided_share=share).generator(pipeline)
    warm = {
        "bare": seconds(lambda: bare(brief), device),
        "recorded": seconds(lambda: brief.generate_at_once(*given), device),
    }
    yield "warm-up seconds", warm
    if arguments.compile_only:
        return
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = {"bare": [], "recorded": []}
    generated = []
    for _ in range(arguments.turns):
        times["bare"].append(seconds(lambda: bare(generator), device))
        times["recorded"].append(
            seconds(lambda: generated.append(generator.generate_at_once(*given)), device)
        )
    yield "seconds a batch", times
    limit = results["flops"]["image"] / results["ceiling"]["flops"]
    for kind, found in times.items():
        rate = batch_size / statistics.median(found)
        yield f"images/s {kind}", rate
        yield f"share of ceiling {kind}", rate * limit
    yield "attribution percent", [100 * (r / b - 1) for b, r in zip(*times.values(), strict=True)]
    yield "sha256 of the images", hashes(generated)
    if device.type == "cuda":
        yield "peak GB", torch.cuda.max_memory_allocated() / 1e9
    if named in arguments.profile and device.type == "cuda":
        longer = replace(synthesize, steps=4, guided_share=share).generator(pipeline)
        yield (
            "profile",
            profile(
                lambda: brief.generate_at_once(*given), lambda: longer.generate_at_once(*given)
            ),
        )
    embed = None
    if named in arguments.parts + arguments.worker:
        embed = measure._embed_stage(spec.preset, DTYPES[spec.dtype], device, batch_size)
    if named in arguments.parts:
        parts = measure._generation_parts(spec, pipeline, generator, prompts[:batch_size], device)
        parts |= measure._record_parts(synthesize, embed, prompts[:batch_size], spec, device)
        yield "ms an image by part", {k: 1000 * v / batch_size for k, v in parts.items()}
        rows = results["flops"]["unet_rows_per_image"] * results["flops"]["unet_row"] * batch_size
        yield "UNet's own share of ceiling", rows / parts["unet"] / results["ceiling"]["flops"]
    if named in arguments.worker:
        measure._whole(stage, embed, prompts[:batch_size])
        started = time.perf_counter()
        written = measure._whole(stage, embed, prompts)
        wall = time.perf_counter() - started
        yield "worker: references and drops", written
        yield "worker: images/s", len(prompts) / wall
        yield "worker: share of ceiling", len(prompts) / wall * limit


def hashes(generated):
    """One hash for each time that the batch was generated: they should be equal."""
    return [
        hashlib.sha256(b"".join(d.image_hwc.tobytes() for d in batch if d.image_hwc is not None))
        .hexdigest()[:16]
        for batch in generated
    ]  # fmt: skip


def bandwidth(device):
    """Bytes read and written a second by a copy within the device's memory."""
    size = 1 << (31 if device.type == "cuda" else 26)
    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    a.random_()
    for _ in range(3):
        b.copy_(a)
    return 2 * size / min(seconds(lambda: b.copy_(a), device) for _ in range(10))


def profile(shorter, longer):
    """Milliseconds on the device by kind of kernel, and the kernels that take longest, of what one
    run does more than the other."""
    kernels = kernels_of(longer)
    for name, (milliseconds, calls) in kernels_of(shorter).items():
        if name in kernels:
            kernels[name] = (kernels[name][0] - milliseconds, kernels[name][1] - calls)
    kinds = dict.fromkeys([*KINDS, "pointwise"], 0.0)
    for name, (milliseconds, _) in kernels.items():
        fits = (kind for kind, words in KINDS.items() if any(w in name.lower() for w in words))
        kinds[next(fits, "pointwise")] += milliseconds
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:25]
    return {
        "ms by kind": kinds,
        "kernels launched": sum(calls for _, calls in kernels.values()),
        "longest": [[name[:110], round(ms, 3), calls] for name, (ms, calls) in longest],
    }


def kernels_of(run):
    """Name of each kernel that runs on the device -> (milliseconds, calls)."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        run()
        torch.cuda.synchronize()
    kernels = {}
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.device_time_total:
            milliseconds, calls = kernels.get(event.name, (0.0, 0))
            kernels[event.name] = (milliseconds + event.device_time_total / 1000, calls + 1)
    return kernels


if __name__ == "__main__":
    main()
