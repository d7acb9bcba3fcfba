"""Which encoders, as data: importable without torch, for specs and manifests."""

from dataclasses import dataclass
from typing import Literal

STRICT = {"extra": "forbid", "strict": True}
"""Unknown settings and values of another type are refused (see `ovref.config`)."""


@dataclass(frozen=True, kw_only=True)
class VisualEncoderConfig:
    """A frozen visual backbone and which of its features are used."""

    __pydantic_config__ = STRICT

    model: str
    """transformers: `miniature:<name>`, folder or hub id of any ViT (DINO, DINOv2, DINOv3, ...).
    open_clip: `miniature:clip`, folder, `hf-hub:<id>`, or `<architecture>:<tag>`."""
    library: Literal["transformers", "open_clip"] = "transformers"
    """The library that loads the model."""
    revision: str = ""
    """Commit or tag on the hub; empty for the newest, or for a local model."""
    size_hw: tuple[int, int] = (512, 512)
    """Height and width in pixels to which each image is resized, aspect ratio not kept; rounded to
    multiples of the patch. FOSSIL's 512 with patch 14 becomes 518: a grid of 37 x 37."""
    features: Literal["tokens", "keys", "values"] = "tokens"
    """`tokens`: last layer, after its norm; of CLIP also projected into the joint space. `keys`:
    of the last attention layer, heads concatenated (DINO, for OpenCut). `values`: of CLIP, the
    last layer with each patch attending to itself only (MaskCLIP), in the joint space."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and arithmetic; results are float32 in any case."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model must name a model, found an empty text")
        if min(self.size_hw) < 1:
            raise ValueError(f"size_hw must be at least 1 pixel, found {self.size_hw}")
        wrong = {"transformers": "values", "open_clip": "keys"}[self.library]
        if self.features == wrong:
            raise ValueError(f"features {wrong!r} are not offered with library {self.library!r}")


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
            raise ValueError("model must name a model, found an empty text")
