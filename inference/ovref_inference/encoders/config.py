"""Which encoders, as data: importable without torch, for specs and manifests."""

from dataclasses import dataclass
from typing import Literal

from ovref_inference.encoders.crops import Masking
from ovref_inference.ranges import STRICT, require_each_at_least


@dataclass(frozen=True, kw_only=True)
class VisualEncoderConfig:
    """A frozen visual backbone and which of its features are used."""

    __pydantic_config__ = STRICT

    model: str
    """transformers: `miniature:<name>`, folder or hub id of a ViT (DINO, DINOv2, DINOv3, DeiT, MAE,
    I-JEPA, ...) or of a CLIP or SigLIP model, whose vision tower is used.
    open_clip: `miniature:clip`, folder, `hf-hub:<id>`, or `<architecture>:<tag>`.
    `own:<name>`: a backbone of your own (`encoders.registry`), whatever the library says."""
    library: Literal["transformers", "open_clip"] = "transformers"
    """The library that loads the model."""
    revision: str = ""
    """Commit or tag on the hub; empty for the newest, or for a local model."""
    size_hw: tuple[int, int] = (512, 512)
    """Height and width in pixels to which each image is resized, aspect ratio not kept; rounded to
    multiples of the patch. FOSSIL's 512 with patch 14 becomes 518: a grid of 37 x 37."""
    features: Literal[
        "tokens", "keys", "values",
        "crop_binary", "crop_heatmap", "crop_none", "crop_heatmap_black",
    ] = "tokens"  # fmt: skip
    """Dense features, pooled over regions: `tokens`: last layer, after its norm; in open_clip also
    projected into the joint space, of a ConvNeXt after pooling, of a ResNet (RN50 to RN50x64) by
    its attention pool on each cell and under each mask (FC-CLIP). `keys`: of the last
    attention layer, heads concatenated (DINO, for OpenCut). `values`: of CLIP's ViT, the last layer
    with each patch attending to itself only (MaskCLIP), in the joint space. Of regions alone:
    `crop_<masking>`, CLIP's embedding of each region cut out, what is around it erased, attenuated
    by its heatmap, or kept (VOCSeg); `size_hw` is then what crops are resized to, best CLIP's own
    input size. What is erased or attenuated goes to CLIP's mean colour, with `crop_heatmap_black`
    to black, which is the paper's product of pixels and heatmap."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights and arithmetic; results are float32 in any case."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model must name a model, found an empty string")
        require_each_at_least("size_hw", self.size_hw, 1)
        clip = self.library == "open_clip"
        if self.features == "keys" if clip else self._of_clip:
            raise ValueError(
                f"features {self.features!r} are not offered with library {self.library!r}"
            )

    @property
    def masking(self) -> Masking | None:
        """The strategy of masked crops; None where dense features are pooled."""
        masking: dict[str, Masking] = {
            "crop_binary": "binary",
            "crop_heatmap": "heatmap",
            "crop_none": "none",
            "crop_heatmap_black": "heatmap",
        }
        return masking.get(self.features)

    @property
    def _of_clip(self) -> bool:
        return self.features == "values" or self.masking is not None


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """A CLIP model whose text tower embeds names and captions."""

    __pydantic_config__ = STRICT

    model: str
    """`miniature:clip`, an open_clip folder, `hf-hub:<id>`, or `<architecture>:<tag>` as in
    `ViT-L-14:openai`."""
    revision: str = ""
    """Commit or tag on the hub; empty for the newest, or for a local model."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model must name a model, found an empty string")
