"""Settings of encoders: importable without torch, for specs and manifests."""

from dataclasses import dataclass, field
from typing import Literal

from ovref_inference.encoders.crops import Masking
from ovref_inference.ranges import (
    ADDED_LATER,
    STRICT,
    require_at_least,
    require_each_at_least,
    require_model,
)


@dataclass(frozen=True, kw_only=True)
class VisualEncoderConfig:
    """A frozen visual backbone and the features that are used of it."""

    __pydantic_config__ = STRICT

    model: str
    """transformers: `miniature:<name>`, folder or hub id of a ViT (DINO, DINOv2, DINOv3, C-RADIO,
    MAE, I-JEPA, ...), a DINOv3 ConvNeXt, or a model of images and texts (CLIP, MetaCLIP 2, SigLIP,
    SigLIP2, TIPSv2), whose vision tower is used.
    open_clip: `miniature:clip`, folder, `hf-hub:<id>`, or `<architecture>:<tag>`.
    timm: folder or hub id of timm's layout (`timm/vit_large_patch16_dinov3.lvd1689m`).
    `own:<name>`: a backbone of your own (`encoders.registry`), whatever the library says.
    The guide on models lists what was tried."""
    library: Literal["transformers", "open_clip", "timm"] = "transformers"
    """The library that loads the model."""
    revision: str = ""
    """Commit or tag on the hub; empty for the newest, or for a local model."""
    size_hw: tuple[int, int] = (512, 512)
    """Height and width in pixels to which each image is resized without keeping the aspect ratio
    (`aspect`); rounded to multiples of the patch. FOSSIL's 512 with patch 14 becomes 518: a grid of
    37 x 37."""
    features: Literal[
        "tokens", "keys", "values",
        "crop_binary", "crop_heatmap", "crop_none", "crop_heatmap_black",
    ] = "tokens"  # fmt: skip
    """Dense features, pooled over regions: `tokens`: last layer, after its norm; in open_clip also
    projected into the joint space, of a ConvNeXt after pooling, of a ResNet (RN50 to RN50x64) by
    its attention pool on each cell and under each mask (FC-CLIP). `keys`: of the last
    attention layer, heads concatenated (DINO, for OpenCut). `values`: of a ViT of images and texts
    (CLIP, SigLIP, ...), the last layer with each patch attending to itself only (MaskCLIP), in the
    joint space. For regions only: `crop_<masking>`, CLIP's embedding of each region's crop with the
    background erased, attenuated by its heatmap, or kept (VOCSeg); crops are resized to `size_hw`,
    best CLIP's own input size. Erased or attenuated pixels move to CLIP's mean colour, or with
    `crop_heatmap_black` to black, as in the paper's product of pixels and heatmap."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights and arithmetic; results are always float32."""
    layer: int = field(default=-1, metadata=ADDED_LATER)
    """Which layer of a ViT counts as the last: -1 its last, -2 the one before, 0 its first. The
    layers after it are not run; the model's last norm is applied to it, and its projection where
    `features` are in the joint space."""
    aspect: Literal["stretched", "kept"] = field(default="stretched", metadata=ADDED_LATER)
    """`kept`: an image keeps its aspect ratio, so that its grid is H/p x W/p (RetCLIP). Its short
    side becomes the smaller number of `size_hw`, or its long side the larger one where that would
    be exceeded; both are rounded to multiples of the patch. For dense features, not of timm's
    ViTs."""
    position_debias: int = field(default=0, metadata=ADDED_LATER)
    """Number of directions of dense features that are projected out because they tell where in the
    image a patch is: the leading ones in which the features of a black image differ from place to
    place (INSID3, which takes 500 of DINOv3-L's 1,024). 0 for none."""

    def __post_init__(self) -> None:
        require_model(self.model)
        require_each_at_least("size_hw", self.size_hw, 1)
        require_at_least("position_debias", self.position_debias, 0)
        if self.position_debias and self.masking is not None:
            raise ValueError("position_debias is for dense features; crops have no places")
        if self.aspect == "kept" and self.masking is not None:
            raise ValueError("aspect kept is for dense features; crops are brought to size_hw")
        clip = self.library == "open_clip"
        offered = self.features != "keys" if clip else self.masking is None
        if not offered or (self.library == "timm" and self.features == "values"):
            raise ValueError(
                f"features {self.features!r} are not offered with library {self.library!r}"
            )

    def size_of(self, size_hw: tuple[int, int], patch: int) -> tuple[int, int]:
        """Height and width to which an image of this size is resized, multiples of the patch."""
        wanted = self.size_hw
        if self.aspect == "kept":
            scale = min(min(wanted) / min(size_hw), max(wanted) / max(size_hw))
            wanted = round(size_hw[0] * scale), round(size_hw[1] * scale)
        return rounded(wanted, patch)

    @property
    def masking(self) -> Masking | None:
        """The masking strategy of crops; None if dense features are pooled."""
        masking: dict[str, Masking] = {
            "crop_binary": "binary",
            "crop_heatmap": "heatmap",
            "crop_none": "none",
            "crop_heatmap_black": "heatmap",
        }
        return masking.get(self.features)


def rounded(size_hw: tuple[int, int], patch: int) -> tuple[int, int]:
    """The nearest multiples of the patch, at least one."""
    height, width = (max(1, (side + patch // 2) // patch) * patch for side in size_hw)
    return height, width


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """A model of images and texts whose text tower embeds names and captions."""

    __pydantic_config__ = STRICT

    model: str
    """open_clip: `miniature:clip`, folder, `hf-hub:<id>`, or `<architecture>:<tag>` as in
    `ViT-L-14:openai`. transformers: folder or hub id of CLIP, MetaCLIP 2, SigLIP, SigLIP2 or
    TIPSv2."""
    revision: str = ""
    """Commit or tag on the hub; empty for the newest, or for a local model."""
    library: Literal["open_clip", "transformers"] = field(default="open_clip", metadata=ADDED_LATER)
    """The library that loads the model."""

    def __post_init__(self) -> None:
        require_model(self.model)
