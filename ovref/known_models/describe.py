"""What a model of a configuration is and does, in words: for `ovref check`.

Each encoder runs on one image or text and is compared with its own library's forward pass; each
detector and SAM runs on one image.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ovref.check_models import models_of
from ovref.devices import cuda, peak_gb
from ovref.errors import ModelError, OvrefError
from ovref.known_models import own_forward
from ovref.licences import licence_of
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.encoders.load import (
    TextEncoder,
    VisualEncoder,
    load_region_encoder,
    load_text_encoder,
    load_visual_encoder,
)
from ovref_inference.proposers.config import GroundingDinoConfig, MaskFormerConfig, SamConfig

EXACT = 1e-4
"""Largest difference, as a share of the largest feature, that rounding in float32 explains."""
NEAR = 0.98
"""Least cosine of two features that rounding in half precision explains."""
TEXT = "a photo of a red boat"
FEATURES = {
    "tokens": "of the last layer, after its norm",
    "keys": "of the last attention layer, heads concatenated",
    "values": "of the last layer, each patch attending to itself alone, in the space of texts",
}

Said = tuple[tuple[str, ...], bool]
"""Lines for people, and whether the model can be used; if not, the last line says why."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """One model."""

    setting: str
    """Where the settings name it: `embed.visual`."""
    model: str
    lines: tuple[str, ...]
    """For people."""
    problem: str = ""
    """Why it cannot be used; empty if it can."""


def describe(
    step: str,
    spec: Any,
    known_as: Mapping[str, str] | None = None,
    skip: Collection[str] = (),
    shapes: bool = False,
) -> list[Described]:
    """Every encoder, detector and SAM that a stage's settings name, loaded and run.

    Args:
        step: name of the stage, for the answers.
        spec: its settings.
        known_as: the model that a folder stands for, where it holds random weights.
        skip: models that are left out.
        shapes: nothing is loaded or run; of encoders, what their configurations alone say.
    """
    found = []
    for setting, config in encoders_of(spec):
        if config.model in skip:
            continue
        known = (known_as or {}).get(config.model, config.model)
        said = partial(Described, setting=f"{step}.{setting}", model=known)
        try:
            lines, sound = _shape(config) if shapes else _DESCRIBERS[type(config)](config)
        except OvrefError as error:
            found.append(said(lines=(), problem=str(error)))
            continue
        lines = (f"licence   {licence_of(known)}", *lines)
        found.append(said(lines=lines, problem="" if sound else lines[-1]))
    return found


def is_described(value: Any) -> bool:
    """Whether a value is the settings of an encoder, detector or SAM."""
    return type(value) in _DESCRIBERS


def others_of(spec: Any) -> list[str]:
    """Models of a stage that `describe` has no words for: generators, taggers."""
    known = {f"{setting}.model" for setting, _ in encoders_of(spec)}
    return [model for setting, model, _ in models_of(spec) if setting not in known]


def encoders_of(spec: Any, setting: str = "") -> Iterator[tuple[str, Any]]:
    """Settings of encoders, detectors and SAMs inside a dataclass, with their place in it."""
    for field in dataclasses.fields(spec):
        value, place = getattr(spec, field.name), f"{setting}{field.name}"
        if type(value) in _DESCRIBERS:
            yield place, value
        elif dataclasses.is_dataclass(value):
            yield from encoders_of(value, f"{place}.")


def text(described: list[Described]) -> str:
    """All of it, for people."""
    blocks = []
    for one in described:
        lines = [f"{one.setting}: {one.model}", *(f"    {line}" for line in one.lines)]
        if one.problem and not one.lines:
            lines.append(f"    CANNOT BE USED: {one.problem}")
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def _shape(config: Any) -> Said:
    from ovref.known_models.shapes import shape_of

    encoder = isinstance(config, VisualEncoderConfig | TextEncoderConfig)
    return shape_of(config) if encoder else (), True


def _visual(config: VisualEncoderConfig) -> Said:
    started = time.monotonic()
    encoder: Any = load_region_encoder(config)
    loaded = time.monotonic() - started
    if not isinstance(encoder, VisualEncoder):
        size = f"{encoder.size_hw[0]} x {encoder.size_hw[1]}"
        return (
            f"regions   {config.features}: {encoder.dim} numbers each, from {size} pixels",
            f"weights   loaded in {loaded:.1f} s; {_peak()}",
            "compared  not: only dense features are",
        ), True
    image = np.random.default_rng(0).integers(0, 256, (*encoder.size_hw, 3), dtype=np.uint8)
    features, seconds = _timed(lambda: encoder.encode([image])[0])
    (height, width), (rows, columns) = encoder.size_hw, encoder.grid_hw
    mean, std = (", ".join(f"{value:.3g}" for value in each)
                 for each in (encoder.images.mean, encoder.images.std))  # fmt: skip
    layer = "" if config.layer == -1 else f"; layer {config.layer} counts as the last"
    device = encoder.device.type
    compared, same = _compared(config, encoder, image, features)
    return (
        f"class     {encoder.model_class} of {config.library}",
        f"images    resized to {height} x {width} pixels ({encoder.images.mode}), values divided "
        f"by {encoder.images.divisor:g}, mean {mean}, standard deviation {std}",
        f"grid      {rows} x {columns} cells of {encoder.patch_size} pixels, {encoder.dim} numbers "
        f"each; {encoder.prefix_tokens} class and register tokens are left out",
        f"features  {config.features}: {FEATURES[config.features]}{layer}",
        f"weights   {encoder.parameters / 1e6:.1f} million numbers in {config.precision}, "
        f"{_bytes(encoder.parameters, config.precision)}, loaded in {loaded:.1f} s; {_peak()}; "
        f"{seconds:.2f} s an image on {device}",
        compared,
    ), same


def _compared(
    config: VisualEncoderConfig, encoder: Any, image: np.ndarray, features: np.ndarray
) -> tuple[str, bool]:
    """How far the library's own forward pass is from the same dense features, and whether that is
    rounding."""
    what = ""
    if config.features != "tokens" or config.layer != -1 or config.position_debias:
        plain = dataclasses.replace(config, features="tokens", layer=-1, position_debias=0)
        encoder = load_visual_encoder(plain)
        config, features, what = plain, encoder.encode([image])[0], "tokens of the last layer, "
    library = config.library
    try:
        own = own_forward.dense(config, image, encoder.patch_size)
    except NotImplementedError as error:
        return f"compared  not: {error}", True
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{library}'s own forward pass fails: {error}") from error
    if own.shape != features.shape:
        return f"compared  DIFFERENT: {library} gives {own.shape}, here {features.shape}", False
    if config.precision == "float32":
        off = float(np.abs(own - features).max() / np.abs(own).max())
        verdict = "the same as" if off < EXACT else "DIFFERENT from"
        return f"compared  {what}{verdict} {library}'s own forward pass (to {off:.0e})", off < EXACT
    dots = (own * features).sum(-1) / np.linalg.norm(own, axis=-1)
    least = float((dots / np.linalg.norm(features, axis=-1)).min())
    verdict = "near" if least > NEAR else "DIFFERENT from"
    return (
        f"compared  {what}{verdict} {library}'s own forward pass in float32 "
        f"(least cosine {least:.4f})"
    ), least > NEAR


def _text(config: TextEncoderConfig) -> Said:
    encoder: TextEncoder = load_text_encoder(config)
    found, seconds = _timed(lambda: encoder.encode([TEXT]))
    own = own_forward.embeddings(config, [TEXT])
    off = float(np.abs(own - found).max())
    verdict = "the same as" if off < EXACT else "DIFFERENT from"
    used, longest = encoder.tokens_of(TEXT)
    return (
        f"class     {encoder.model_class} of {config.library}",
        f"texts     {TEXT!r} is {used} of {longest} tokens, what is longer is cut; {encoder.dim} "
        f"numbers, of length 1; {seconds:.2f} s a text",
        f"weights   {encoder.parameters / 1e6:.1f} million numbers with the image tower; {_peak()}",
        f"compared  {verdict} {config.library}'s own tokenizer and forward pass (to {off:.0e})",
    ), off < EXACT


def _detector(config: GroundingDinoConfig) -> Said:
    from ovref_inference.proposers import load_detector

    detector = load_detector(config)
    (found,), seconds = _timed(lambda: detector.detect([_picture()], [["boat", "tree"]]))
    return (
        f"finds     boxes of nouns, above {config.box_threshold}; {len(found.scores)} of two nouns "
        f"in a picture of noise; {seconds:.2f} s an image; {_peak()}",
    ), True


def _sam(config: SamConfig) -> Said:
    from ovref_inference.pixels import device_of
    from ovref_inference.proposers import SamMasks, load_sam

    sam = load_sam(config.model, device_of(None), revision=config.revision)
    masks = SamMasks(sam)
    boxes = [np.array([[20.0, 20.0, 100.0, 140.0]])]
    (first, *_), seconds = _timed(lambda: list(masks.of_boxes([_picture()], boxes)))
    return (
        f"class     {type(sam).__name__} of transformers",
        f"masks     of boxes, at the size of the image; one of noise covers {first[0].mean():.0%}; "
        f"{seconds:.2f} s an image; {_peak()}",
    ), True


def _mask_former(config: MaskFormerConfig) -> Said:
    from ovref_inference.proposers import load_mask_former

    model = load_mask_former(config)
    found, seconds = _timed(lambda: list(model.propose([_picture()])))
    return (
        f"masks     {len(found[0].mask_probs_nhw)} in a picture of noise; {seconds:.2f} s an "
        f"image; {_peak()}",
    ), True


_DESCRIBERS: dict[type, Callable[[Any], Said]] = {
    VisualEncoderConfig: _visual,
    TextEncoderConfig: _text,
    GroundingDinoConfig: _detector,
    SamConfig: _sam,
    MaskFormerConfig: _mask_former,
}


def _picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (160, 240, 3), dtype=np.uint8)


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The second of two runs, and its seconds: the first one warms up."""
    run()
    started = time.monotonic()
    found = run()
    return found, time.monotonic() - started


def _bytes(parameters: int, precision: str) -> str:
    return f"{parameters * (4 if precision == 'float32' else 2) / 1e9:.2f} GB"


def _peak() -> str:
    kind = "memory" if cuda() is None else "GPU memory"
    return f"peak {peak_gb():.2f} GB of {kind} so far"
