"""Measuring a worker: parts alone on the shapes of a batch, the whole as it runs in a build."""

import contextlib
import platform
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from attribute_images import conditioning_of
from bench import presets
from bench.limits import (
    BenchSpec,
    alternately,
    ceiling,
    count,
    operations,
    texts_per_image,
)
from ovref.config import dump
from ovref.contract import Dropped
from ovref.identity import record_key
from ovref.miniature.scenes import render
from ovref.models.attribution import noun_weights
from ovref.models.diffusion import GeneratedImage, Generator, to_uint8
from ovref.models.loading import DTYPES, optimize_pipeline
from ovref.models.recorders import guided_steps
from ovref.models.recorders.unet import recording
from ovref.ops.binarisation import binarise, min_max_scaled, resized
from ovref.records import Noun, Prompt
from ovref.stages.embed import Embed, EmbedStage
from ovref.stages.synthesize import Synthesize, SynthesizeStage
from ovref.storage.shards import ShardFiles
from ovref.stored_images import jpeg_of
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig


def bench(spec: BenchSpec, progress: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs a benchmark.

    Args:
        spec: what is measured.
        progress: receives a line now and then, for people.

    Returns:
        What `report.table` shows: machine, the measured ceiling in FLOP/s, operation counts, a row
        for each scheduler and batch size, and the backbones.

    Raises:
        ConfigError, ModelError: as the worker's own parts.
    """
    device = torch.device(spec.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose memory and end of work are asked for
    dtype = DTYPES[spec.dtype]
    progress(f"measuring the matrix product of {spec.dtype}")
    result: dict[str, Any] = {
        "spec": dump(spec),
        "machine": _machine(device),
        "clock": "wall" if device.type == "cuda" else "CPU time of the process",
        "ceiling": ceiling(dtype, device),
    }
    progress("counting operations")
    pipeline = presets.pipeline(spec.preset, spec.schedulers[0], dtype, device)
    result["flops"] = operations(spec, pipeline)
    result["rows"] = []
    for scheduler in spec.schedulers:
        if scheduler != spec.schedulers[0]:
            del pipeline  # two in memory at once would spoil the peak
            pipeline = presets.pipeline(spec.preset, scheduler, dtype, device)
        optimize_pipeline(
            pipeline,
            compiled=spec.compiled,
            channels_last=spec.channels_last,
            fused_projections=spec.fused_projections,
            cuda_graphs=spec.cuda_graphs,
        )
        for batch_size in spec.batch_sizes:
            progress(f"{spec.preset}, {scheduler}, batch of {batch_size}")
            if spec.compiled:
                torch.compiler.reset()  # only so many versions of a model may be compiled
            try:
                row = _row(spec, pipeline, scheduler, batch_size, device, result)
            except torch.OutOfMemoryError:
                row = {"error": "out of memory"}
                torch.cuda.empty_cache()
            result["rows"].append({"scheduler": scheduler, "batch_size": batch_size, **row})
    del pipeline
    if spec.backbones:
        result["backbones"] = {
            name: _backbone(name, dtype, device, spec, result["ceiling"])
            for name in presets.backbones()
        }
    return result


def _row(
    spec: BenchSpec,
    pipeline: Any,
    scheduler: str,
    batch_size: int,
    device: torch.device,
    result: dict[str, Any],
) -> dict[str, Any]:
    """Everything about one batch size; seconds are of one image."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synthesize = spec.synthesis(scheduler, batch_size)
    generator = synthesize.generator(pipeline)
    stage = SynthesizeStage(synthesize, generator)
    embed = _embed_stage(spec.preset, DTYPES[spec.dtype], device, batch_size)
    prompts = _prompts(batch_size * spec.batches)

    parts = _generation_parts(spec, pipeline, generator, prompts[:batch_size], device)
    parts |= _record_parts(synthesize, embed, prompts[:batch_size], spec, device)
    parts = {name: seconds / batch_size for name, seconds in parts.items()}

    _whole(stage, embed, prompts[:batch_size])  # warms up what the parts have not
    started, cpu = time.perf_counter(), time.process_time()
    written, dropped = _whole(stage, embed, prompts)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    seconds = (wall if device.type == "cuda" else cpu) / len(prompts)
    unet_seconds = parts["unet"] + parts["attribution"]
    flops = result["flops"]
    in_unet = flops["unet_rows_per_image"] * flops["unet_row"]
    return {
        "images_per_second": 1 / seconds,
        "wall_images_per_second": len(prompts) / wall,
        "seconds_by_part": parts,
        "attribution_percent_of_generation": 100
        * parts["attribution"]
        / (parts["text"] + parts["unet"] + parts["scheduler"] + parts["decode"]),
        "unet_share_of_time": unet_seconds / seconds,
        "share_of_ceiling": flops["image"] / seconds / result["ceiling"]["flops"],
        "unet_share_of_ceiling": in_unet / parts["unet"] / result["ceiling"]["flops"],
        "peak_memory_gb": _peak(device),
        "references": written,
        "dropped": dropped,
    }


def _generation_parts(
    spec: BenchSpec,
    pipeline: Any,
    generator: Generator,
    prompts: list[Prompt],
    device: torch.device,
) -> dict[str, float]:
    """Seconds of a batch: text, UNet without attribution, attribution, scheduler, decoding."""
    captions = [prompt.caption for prompt in prompts]
    height, width = presets.SIZES_HW[spec.preset]
    factor, dtype = pipeline.vae_scale_factor, DTYPES[spec.dtype]
    latent_hw = (height // factor, width // factor)
    positions = [
        generator.positions(p.caption, [[(noun.start, noun.end)] for noun in p.nouns])
        for p in prompts
    ]
    weights_bkn = noun_weights(positions, pipeline.tokenizer.model_max_length)
    # Of the type that the scheduler gives to the UNet.
    pipeline.scheduler.set_timesteps(spec.steps, device=device)
    timestep = pipeline.scheduler.timesteps[0]
    guided = guided_steps(spec.steps, spec.guidance, spec.guided_share)
    latents = torch.randn(len(prompts), 4, *latent_hw).to(device, dtype)

    with torch.no_grad():
        conditioning = conditioning_of(pipeline, captions, (height, width))

    def unet(rows: int) -> None:
        # Under guidance every caption has two rows; what stands in them does not change the time.
        twice = rows // len(prompts)
        doubled = _doubled(conditioning) if twice == 2 else conditioning
        # Called as the pipeline calls it, or what is compiled would be compiled again for that.
        pipeline.unet(
            torch.cat([latents] * twice),
            timestep,
            timestep_cond=None,
            cross_attention_kwargs=None,
            return_dict=False,
            **{"added_cond_kwargs": None, **doubled},
        )

    def recorder() -> Any:
        return recording(pipeline.unet, weights_bkn, latent_hw)

    found = {"unet": 0.0, "attribution": 0.0}
    for rows, steps in (
        (2 * len(prompts), guided),
        (len(prompts), spec.steps - guided),
    ):
        if not steps:
            continue
        bare, recorded = alternately(
            [lambda r=rows: unet(r)] * 2, spec.repeats, device, [contextlib.nullcontext, recorder]
        )
        found["unet"] += steps * bare
        found["attribution"] += steps * (recorded - bare)
    with torch.no_grad(), recorder() as attribution:
        unet(2 * len(prompts) if guided else len(prompts))

    def once() -> None:
        with recorder():
            attribution.heatmaps_bnhw().cpu()

    found["attribution"] += alternately([once], spec.repeats, device)[0]

    def step_all() -> None:
        pipeline.scheduler.set_timesteps(spec.steps, device=device)
        moving = latents
        for t in pipeline.scheduler.timesteps:
            moving = pipeline.scheduler.step(latents, t, moving, return_dict=False)[0]

    (found["scheduler"],) = alternately([step_all], spec.repeats, device)
    (found["text"],) = alternately(
        [lambda: conditioning_of(pipeline, captions, (height, width))], spec.repeats, device
    )
    found["text"] *= texts_per_image(spec, pipeline)

    def decode() -> None:
        scaled = latents / pipeline.vae.config.scaling_factor
        decoded = pipeline.vae.decode(scaled, return_dict=False)[0]
        to_uint8(pipeline.image_processor.postprocess(decoded, output_type="pt"))[0].cpu()

    (found["decode"],) = alternately([decode], spec.repeats, device)
    return found


def _record_parts(
    synthesize: Synthesize,
    embed: EmbedStage,
    prompts: list[Prompt],
    spec: BenchSpec,
    device: torch.device,
) -> dict[str, float]:
    """Seconds of a batch: masks, JPEG, embedding, writing; on one thread."""
    rng = np.random.default_rng(0)
    size_hw = presets.SIZES_HW[spec.preset]
    image_hwc = rng.integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    maps = smooth_heatmaps(len(prompts), size_hw)
    made = SynthesizeStage(synthesize, _Generated(image_hwc, maps))(iter(prompts))
    records = [record for record in made if not isinstance(record, Dropped)]

    def binarise_all() -> None:
        for prompt, heatmaps_nhw in zip(prompts, maps, strict=True):
            found_nhw = min_max_scaled(heatmaps_nhw[: len(prompt.nouns)])
            binarise(found_nhw, size_hw, synthesize.binarise)

    def write() -> None:
        with ShardFiles() as files:
            for record in records:
                files.add(record)
            files.finish([])

    runs = {
        "masks": binarise_all,
        "jpeg": lambda: [jpeg_of(image_hwc, synthesize.jpeg_quality) for _ in prompts],
        "embedding": lambda: list(embed(iter(records))),
        "writing": write,
    }
    return dict(zip(runs, alternately(list(runs.values()), spec.repeats, device), strict=True))


def smooth_heatmaps(count: int, size_hw: tuple[int, int]) -> np.ndarray:
    """(count, 8, H / 8, W / 8) float32 >= 0: as smooth as attention of a trained model; masks of
    random weights are noise, which takes longer to encode."""
    rng = np.random.default_rng(0)
    latent_hw = (size_hw[0] // 8, size_hw[1] // 8)
    maps = [resized(coarse_hw, latent_hw) for coarse_hw in rng.random((count * 8, 8, 8))]
    return np.stack(maps).clip(min=0).reshape(count, 8, *latent_hw)


class _Generated:
    """A generator that has generated already."""

    def __init__(self, image_hwc: np.ndarray, maps_bnhw: np.ndarray) -> None:
        self._image_hwc, self._maps_bnhw = image_hwc, maps_bnhw

    def positions(self, caption: str, spans: list[Any]) -> list[tuple[int, ...]]:
        return [(1,)] * len(spans)

    def generate(
        self, captions: list[str], positions: list[Any], seeds: list[int]
    ) -> list[GeneratedImage]:
        return [
            GeneratedImage(image_hwc=self._image_hwc, heatmaps_nhw=maps[: len(nouns)])
            for maps, nouns in zip(self._maps_bnhw, positions, strict=False)
        ]


def _whole(generate: SynthesizeStage, embed: EmbedStage, prompts: list[Prompt]) -> tuple[int, int]:
    """A worker's path: generates, keeps the images, embeds. References written, records dropped."""
    written = dropped = 0
    with ShardFiles() as images, ShardFiles() as references:

        def kept():
            nonlocal dropped
            for record in generate(iter(prompts)):
                if isinstance(record, Dropped):
                    dropped += "#" not in record.key
                else:
                    images.add(record)
                    yield record

        for reference in embed(kept()):
            if not isinstance(reference, Dropped):
                references.add(reference)
                written += 1
        images.finish([])
        references.finish([])
    return written, dropped


def _embed_stage(
    preset: str, dtype: torch.dtype, device: torch.device, batch_size: int
) -> EmbedStage:
    visual, texts = presets.encoders(preset, dtype, device, batch_size)
    spec = Embed(
        visual=VisualEncoderConfig(model=preset),
        text=TextEncoderConfig(model=preset),
        batch_size=batch_size,
    )
    return EmbedStage(spec, visual, texts)


def requested(
    stage: SynthesizeStage, prompts: list[Prompt]
) -> tuple[list[str], list[list[tuple[int, ...]]], list[int]]:
    """What the stage asks its generator for: captions, positions of the nouns' tokens, seeds."""
    requests = [request for _, batch in stage._batches(iter(prompts)) for request in batch]
    return (
        [request.prompt.caption for request in requests],
        [request.positions for request in requests],
        [request.seed for request in requests],
    )


def _prompts(count: int) -> list[Prompt]:
    found = []
    for seed in range(count):
        scene = render(seed, "validation")
        nouns = tuple(Noun(text=n.lemma, start=n.start, end=n.end) for n in scene.nouns)
        key = record_key("bench", scene.caption, seed)
        found.append(Prompt(key=key, caption=scene.caption, nouns=nouns, source=f"bench:{seed}"))
    return found


def _backbone(
    name: str, dtype: torch.dtype, device: torch.device, spec: BenchSpec, top: dict[str, float]
) -> dict[str, Any]:
    build, inputs = presets.backbones()[name]
    batch_size = max(spec.batch_sizes)
    with torch.device(device):
        # Some models make buffers from NumPy arrays, which stay on the CPU until they are moved.
        model = build().eval().to(device, dtype)
        given = inputs(batch_size)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    with torch.no_grad():
        flops = count(lambda: model(**given)) / batch_size
    (seconds,) = alternately([lambda: model(**given)], spec.repeats, device)
    rate = batch_size / seconds
    return {
        "batch_size": batch_size,
        "images_per_second": rate,
        "flops": flops,
        "share_of_ceiling": flops * rate / top["flops"],
    }


def _doubled(conditioning: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _doubled(value) if isinstance(value, dict) else torch.cat([value, value])
        for name, value in conditioning.items()
    }


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _peak(device: torch.device) -> float:
    """Most memory used so far: of the GPU by this row, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
