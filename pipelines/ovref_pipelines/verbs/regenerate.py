"""Regenerates one reference from its provenance, and compares it with the one in the collection.

The collection's row names the shard and the record; the build has the settings (`build.json`) and
the prompt. The image is generated and embedded alone. Kernels round differently at another batch
size, so if the bits differ, the whole batch is generated again, which must give the stored bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ovref import config as configs
from ovref.contract import Spec, base_key
from ovref.errors import InputError, MismatchError
from ovref.identity import spec_identity
from ovref.locations import with_absolute_models
from ovref.records import YES, ImageRecord, Reference
from ovref.stages.synthesize import Synthesize
from ovref.storage.steps import StepFolder
from ovref_inference import ReferenceCollection
from ovref_inference.vectors import check_readable
from ovref_pipelines.build_config import BuildConfig
from ovref_pipelines.folders import same_but_for_versions
from ovref_pipelines.output import (
    BUILD,
    FOLDER,
    BuildOutput,
    build_config,
    open_build,
)

SAME = 0.999
"""Minimum cosine at which a regenerated reference counts as the same except for rounding."""


@dataclass(frozen=True, kw_only=True)
class Regenerated:
    """Comparison of a regenerated reference with the one in the collection."""

    row: dict[str, Any]
    """The row of the collection's table."""
    image_equal: bool
    """Whether the image file equals the stored one."""
    pixel_difference: int
    """Largest absolute difference of the two images, over pixels and channels, 0 to 255."""
    mask_iou: float
    """IoU of the two masks; 0 where the noun's region was dropped this time."""
    visual_cosine: float
    textual_cosine: float
    bits_equal: bool
    """Whether both embeddings are bit-identical to the stored ones."""
    other_versions: tuple[str, ...]
    """Steps of the build that were made by another version of a stage."""
    equal_in_batch: bool | None
    """Whether it has the stored bytes if generated and embedded in its batch; None if it has them
    alone, so that this was not tried."""

    @property
    def same(self) -> bool:
        """Whether it is the same reference, except for rounding."""
        return self.bits_equal or min(self.visual_cosine, self.textual_cosine) >= SAME


def regenerate(collection: ReferenceCollection, reference: int, build: str) -> Regenerated:
    """Regenerates `reference` with the models of the build.

    Args:
        reference: an id of the collection.
        build: folder or URL of the build's output.

    Raises:
        InputError: the reference does not exist or is deleted, or the build did not make it or no
            longer has its prompt.
        MismatchError: the build was made with other settings than its build.json has. A different
            version of a stage is accepted, since the comparison shows whether it gives the same.
        OvrefError: a model cannot be loaded, or the build's files are damaged.
    """
    row = row_of(collection, reference)
    made_by, _, shard = row["shard"].partition("/")
    output = open_build(build)
    settings = build_config(output.store)
    folder = settings.pop(FOLDER, None)
    if not settings:
        raise InputError(
            f"there is no {BUILD} in {output.store.url}: give the output of the build that made "
            "the collection with --build"
        )
    config = configs.parse(BuildConfig, settings, where=f"{output.store.url}/{BUILD}")
    prompts = output.step("selected" if output.selects else "prompts")
    images = _step(output, "images", config.make_images)
    references = _step(output, "references", config.embed)
    if not references.fingerprint.startswith(made_by):
        raise InputError(
            f"reference {reference} was made by a step with the fingerprint {made_by}..., the one "
            f"of {build} has {references.fingerprint[:12]}: give the build that made it with "
            "--build"
        )
    key = base_key(row["key"])
    prompt, kept = _one(prompts, shard, key), _one(images, shard, key)
    check_readable(collection.textual)
    generate = with_absolute_models(_as_generated(config.make_images, kept), folder).build()
    embed = with_absolute_models(config.embed, folder).build()
    stored = collection.visual[reference], collection.textual[reference]

    image = _first(generate(iter([prompt])), key, ImageRecord)
    made = None if image is None else _first(embed(iter([image])), row["key"], Reference)
    if made is not None and made.noun.text != row["noun"]:
        made = None  # the number of earlier regions changed, so this is another noun's region
    visual, textual = (0.0, 0.0) if made is None else _cosines(made, stored)
    equal = image is not None and image.image == kept.image
    bits = made is not None and _same_bits(made, stored)
    equal_in_batch = None
    if not (equal and bits):
        again = _first(generate(prompts.read(shard)), key, ImageRecord)
        beside = _first(embed(images.read(shard)), row["key"], Reference)
        equal_in_batch = (
            again is not None and again.image == kept.image
            and beside is not None and _same_bits(beside, stored)
        )  # fmt: skip
    return Regenerated(
        row=row,
        image_equal=equal,
        pixel_difference=255 if image is None else _pixel_difference(image, kept),
        mask_iou=0.0 if image is None else _mask_iou(image, kept, row["noun"]),
        visual_cosine=visual,
        textual_cosine=textual,
        bits_equal=bits,
        other_versions=(
            *_other_version(images, config.make_images), *_other_version(references, config.embed)
        ),
        equal_in_batch=equal_in_batch,
    )


def row_of(collection: ReferenceCollection, reference: int) -> dict[str, Any]:
    """The row of a reference in the collection's table. Raises InputError if there is none."""
    try:
        return collection.rows([reference])[0]
    except ValueError as error:
        raise InputError(str(error)) from error


def reference_text(row: dict[str, Any]) -> str:
    """The row of a reference as text, one line per column."""
    width = max(map(len, row))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in row.items())


def text(found: Regenerated) -> str:
    """The comparison, for people."""
    if found.image_equal and found.bits_equal:
        return "regenerated alone: the same image and the same embeddings, bit for bit"
    image = "the same image" if found.image_equal else (
        f"pixels differ by {found.pixel_difference} of 255 at most"
    )  # fmt: skip
    lines = [
        f"regenerated alone: {image}, mask IoU {found.mask_iou:.4f}, cosine "
        f"{found.visual_cosine:.6f} (visual) and {found.textual_cosine:.6f} (textual)",
        "regenerated in its batch: the same bytes; a batch of another size rounds differently"
        if found.equal_in_batch
        else "regenerated in its batch: still other bytes; another machine, device or library "
        "rounds differently",
    ]
    if found.other_versions:
        lines.append(f"made by an ovref with other stages: {', '.join(found.other_versions)}")
    if not found.same:
        lines.append(f"this is another reference: a cosine is below {SAME}")
    return "\n".join(lines)


def _as_generated(spec: Any, kept: ImageRecord) -> Any:
    """The spec with the batch size that `auto` resolved to when the record was made."""
    if isinstance(spec, Synthesize) and spec.batch_size == "auto":
        return replace(spec, batch_size=kept.provenance["batch_size"])
    return spec


def _step(output: BuildOutput, name: str, spec: Spec) -> StepFolder:
    step, identity = output.step(name), {"stages": [spec_identity(spec)]}
    if not same_but_for_versions(step.identity, identity):
        raise MismatchError(f"{step.store.url} was made with other settings than {BUILD} has now")
    return step


def _other_version(step: StepFolder, spec: Spec) -> list[str]:
    """Says so if another version of the stage made the step."""
    (stage,) = step.identity["stages"]
    if stage["version"] == spec.version:
        return []
    return [f"{step.name} by version {stage['version']} of {spec.name}, now {spec.version}"]


def _one(step: StepFolder, shard: str, key: str) -> Any:
    for record in step.read(shard):
        if record.key == key:
            return record
    raise InputError(f"shard {shard} of {step.store.url} has no record {key}")


def _first(items: Iterator[Any], key: str, kind: Any) -> Any:
    """The first item with this key, without consuming the rest; None if there is none."""
    return next((item for item in items if isinstance(item, kind) and item.key == key), None)


def _cosines(made: Reference, stored: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    pairs = zip((made.visual, made.textual), stored, strict=True)
    vectors = [(left.astype(np.float64), right.astype(np.float64)) for left, right in pairs]
    visual, textual = (float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) for a, b in vectors)
    return visual, textual


def _same_bits(made: Reference, stored: tuple[np.ndarray, np.ndarray]) -> bool:
    return all(
        np.array_equal(left, right)
        for left, right in zip((made.visual, made.textual), stored, strict=True)
    )


def _pixel_difference(left: ImageRecord, right: ImageRecord) -> int:
    a, b = (image.image_hwc().astype(np.int16) for image in (left, right))
    return 255 if a.shape != b.shape else int(np.abs(a - b).max())


def _mask_iou(left: ImageRecord, right: ImageRecord, noun: str) -> float:
    a, b = (
        next((r.mask_hw == YES for r in image.regions if r.noun.text == noun), None)
        for image in (left, right)
    )
    if a is None or b is None or a.shape != b.shape:
        return 0.0
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0
