"""Settings of CLIP-RC's network, as data: importable without torch."""

import math
from dataclasses import dataclass
from typing import Literal

from ovref_inference.ranges import STRICT, require_at_least, require_each_at_least, require_within


@dataclass(frozen=True, kw_only=True)
class ClipRcNetworkConfig:
    """A frozen CLIP and what is trained with it; the defaults are the paper's for VOC."""

    __pydantic_config__ = STRICT

    model: str = "ViT-B-16:openai"
    """An open_clip ViT with a class token: `miniature:clip`, a folder, `hf-hub:<id>`, or
    `<architecture>:<tag>`. Its weights never change."""
    revision: str = ""
    """Commit or tag on the hub; empty for the newest, or for a local model."""
    size_hw: tuple[int, int] = (512, 512)
    """Height and width in pixels of what the network sees at once; multiples of the patch."""
    regions: int = 16
    """Tokens of the region-level bridge, a square number whose root divides the rows and columns of
    patches; 0 leaves the bridge out."""
    update_regions: bool = False
    """Whether the bridge's tokens are trained, instead of being copies of the class token; the
    paper finds that worse (table 6)."""
    prompts: int = 10
    """Trained tokens that enter each layer of the ViT; 0 leaves its features as they are."""
    align: tuple[Literal["global", "regions"], ...] = ("global", "regions")
    """What is put beside each patch before the decoder (eq. 4, table 7): the image's embedding, and
    that of the patch's region."""
    layers: int = 3
    """Layers of the decoder."""
    heads: int = 8
    """Attention heads of a layer; they divide the width of CLIP's joint space."""
    ffn: int = 2048
    """Hidden units of a layer's feed-forward network."""
    dropout: float = 0.1
    """Share of values that are dropped in training."""
    recovery_layers: int = 1
    """Layers of the recovery decoder (table 8), which only training uses; 0 leaves it out."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model must name a CLIP model, found an empty string")
        require_each_at_least("size_hw", self.size_hw, 1)
        for name in ("regions", "prompts", "recovery_layers"):
            require_at_least(name, getattr(self, name), 0)
        for name in ("layers", "heads", "ffn"):
            require_at_least(name, getattr(self, name), 1)
        require_within("dropout", self.dropout, 0, 1, "[)")
        if self.root**2 != self.regions:
            raise ValueError(f"regions must be a square number or 0, found {self.regions}")
        if len(set(self.align)) < len(self.align):
            raise ValueError(f"align must name each part once, found {self.align}")
        if "regions" in self.align and not self.regions:
            raise ValueError("align must leave out 'regions' where regions is 0")
        if self.update_regions and not self.regions:
            raise ValueError("update_regions must be false where regions is 0")

    @property
    def root(self) -> int:
        """Regions in a row and in a column."""
        return math.isqrt(self.regions)
