"""What the machine and the architectures set: clocks, the ceiling, operation counts."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import diffusers
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import presets
from ovref.config import STRICT
from ovref.models.recorders import guided_steps, network_of
from ovref.models.recorders.sd3 import T5_CONTEXT
from ovref.models.schedulers import SCHEDULERS
from ovref.stages.synthesize import Synthesize
from ovref_inference.ranges import require_at_least


@dataclass(frozen=True, kw_only=True)
class BenchSpec(Synthesize):
    """What is measured, and the settings of `Synthesize` with which it is."""

    __pydantic_config__ = STRICT
    SET_HERE: ClassVar = ("scheduler", "batch_size", "size_hw", "min_area", "max_area")
    """What `synthesis` sets from the fields below, or so that no image of random weights is
    dropped."""

    model: str = ""
    """Set by `preset`."""
    steps: int = 50
    """Scheduler steps per image: DDIM, the default here, needs more than `Synthesize` takes."""
    preset: Literal["miniature", "sd15", "sd21", "sdxl", "sd35_medium"] = "miniature"
    """Whose architectures: the miniature, or published ones in full size with random weights."""
    batch_sizes: tuple[int, ...] = (8,)
    """Prompts drawn together, each tried; the table says which gave most images a second."""
    schedulers: tuple[str, ...] = ("ddim",)
    """As in `Synthesize.scheduler`, each tried."""
    cuda_graphs: bool = False
    """What is compiled is launched as CUDA graphs where the compiler can; only with `compiled`."""
    device: str = ""
    """A device of torch, such as `cuda:0`; empty takes the CUDA device where there is one."""
    repeats: int = 3
    """Times that a part is measured; the median counts."""
    batches: int = 3
    """Batches that the whole worker generates to measure images a second."""
    backbones: bool = False
    """Also measures a forward pass of DINOv2, CLIP, GroundingDINO and SAM."""
    output: str | None = None
    """File for the results, in JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {field.name: field.default for field in fields(Synthesize)} | {"model": ""}
        for name in ("model", *self.SET_HERE):
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} is set by preset, schedulers and batch_sizes")
        require_at_least("repeats", self.repeats, 1)
        require_at_least("batches", self.batches, 1)
        if self.cuda_graphs and not self.compiled:
            raise ValueError("cuda_graphs needs compiled")
        unknown = sorted(set(self.schedulers) - set(SCHEDULERS))
        if unknown or not self.schedulers:
            raise ValueError(f"schedulers must be of {', '.join(SCHEDULERS)}, found {unknown}")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes must be at least 1 each, found {self.batch_sizes}")

    def synthesis(self, scheduler: str, batch_size: int, **changes: Any) -> Synthesize:
        """The stage's settings for one scheduler and one size of batches."""
        settings: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Synthesize)}
        settings |= {
            "model": self.preset, "scheduler": scheduler, "batch_size": batch_size,
            "size_hw": presets.SIZES_HW[self.preset], "min_area": 0.0, "max_area": 1.0,
        }  # fmt: skip
        return Synthesize(**settings | changes)


def ceiling(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The best rate of a square matrix product of random numbers: {"size": n, "flops": FLOP/s}.

    A product of two n x n matrices is 2 n^3 operations, a multiplication and an addition counted
    each, as `torch.utils.flop_counter` counts them.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    best = min(seconds(lambda: a @ b, device) for _ in range(10))
    return {"size": size, "flops": 2 * size**3 / best}


def operations(spec: BenchSpec, pipeline: Any) -> dict[str, float]:
    """Operations of one row of the UNet, one text, one decoded image, and one image in all."""
    height, width = (side // pipeline.vae_scale_factor for side in presets.SIZES_HW[spec.preset])
    network = network_of(pipeline)
    # Without values there is nothing to compute: only shapes are counted.
    with torch.device("meta"), torch.no_grad():
        empty = type(network).from_config(network.config)
        vae = type(pipeline.vae).from_config(pipeline.vae.config)
        texts = [type(text)(text.config) for text in _text_encoders(pipeline)]
        latents = torch.zeros(1, network.config.in_channels, height, width)
        ids = [torch.zeros(1, keys, dtype=torch.int64) for keys in _contexts(pipeline)]
        counts = {
            "unet_row": count(lambda: empty(latents, **_texts_of_row(network, texts, ids))),
            "text": sum(count(lambda t=t, i=i: t(i)) for t, i in zip(texts, ids, strict=True)),
            "decode": count(lambda: vae.decode(latents)),
        }
    counts["unet_rows_per_image"] = spec.steps + guided_steps(
        spec.steps, spec.guidance, spec.guided_share
    )
    counts["texts_per_image"] = texts_per_image(spec, pipeline)
    counts["image"] = (
        counts["unet_rows_per_image"] * counts["unet_row"]
        + counts["texts_per_image"] * counts["text"]
        + counts["decode"]
    )
    return counts


def alternately(
    runs: list[Callable[[], Any]],
    repeats: int,
    device: torch.device,
    inside: list[Callable[[], contextlib.AbstractContextManager]] | None = None,
) -> list[float]:
    """Median seconds of each, run in turn so that what else the machine does meets all alike.

    `inside` makes for each what it runs inside of, whose own time does not count.
    """
    pairs = list(zip(runs, inside or [contextlib.nullcontext] * len(runs), strict=True))
    times = []
    with torch.no_grad():
        for repeat in range(repeats + 1):
            row = []
            for run, context in pairs:
                with context():
                    row.append(seconds(run, device))
            if repeat:  # at first kernels are chosen and compiled
                times.append(row)
    return [float(np.median(column)) for column in zip(*times, strict=True)]


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """One run: on a GPU by the wall, waiting for it to end, otherwise CPU time of the process."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - started
    started = time.process_time()
    run()
    return time.process_time() - started


def count(run: Callable[[], Any]) -> float:
    """Operations of one run; a multiplication and an addition count each."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def texts_per_image(spec: BenchSpec, pipeline: Any) -> int:
    """Texts encoded: the caption, and under guidance nothing, which SDXL takes for zeros."""
    zeros = pipeline.config.get("force_zeros_for_empty_prompt", False)
    return 2 if spec.guidance > 1 and not zeros else 1


def _text_encoders(pipeline: Any) -> list[Any]:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return [part for name in names if (part := getattr(pipeline, name, None)) is not None]


def _contexts(pipeline: Any) -> list[int]:
    """Tokens that each text encoder sees."""
    longer = {"T5EncoderModel": T5_CONTEXT}
    keys = pipeline.tokenizer.model_max_length
    return [longer.get(type(text).__name__, keys) for text in _text_encoders(pipeline)]


def _texts_of_row(network: Any, texts: list[Any], ids: list[torch.Tensor]) -> dict[str, Any]:
    """What a row of the network is called with besides the latents."""
    if isinstance(network, diffusers.SD3Transformer2DModel):
        # The CLIP encoders' tokens are joined along channels, T5's follow.
        keys = ids[0].shape[1] + ids[2].shape[1]
        return {
            "encoder_hidden_states": torch.zeros(1, keys, network.config.joint_attention_dim),
            "pooled_projections": torch.zeros(1, network.config.pooled_projection_dim),
            "timestep": torch.ones(1),
        }
    text = torch.zeros(1, ids[0].shape[1], network.config.cross_attention_dim)
    given: dict[str, Any] = {"encoder_hidden_states": text, "timestep": 1}
    if len(texts) == 2:
        pooled = torch.zeros(1, texts[1].config.projection_dim)
        given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.zeros(1, 6)}
    return given
