"""Evaluation protocols: image sizes, windows and background thresholds, under established names.

A score is only meaningful with its protocol: the size that images are resized to, the windows they
are cut into, the threshold of background. So protocols are named and frozen, and every result
states its own. `apply_protocol` runs a segmenter with one.

Results are evaluated at the size of the image, with one exception made by the readers of data sets:
ADE20K's 847 classes, whose images and labels have a short side of at most 512 (Mask2Former).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from ovref.errors import ConfigError
from ovref_inference.ranges import STRICT, require_above, require_at_least, require_within
from ovref_inference.segmenters.windows import WindowConfig, resized_size


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How images are presented to a segmenter and its scores become a label map."""

    __pydantic_config__ = STRICT

    name: str
    """Name in results."""
    source: str
    """Source of the settings."""
    resize: Literal["none", "short_side", "long_side", "square"] = "none"
    """Which side is resized to `side`, up or down, keeping the aspect ratio; `square` resizes both,
    without keeping it."""
    side: int = 0
    """Size in pixels; 0 with `none`."""
    longest: int | None = None
    """With `short_side`: maximum long side; images that would exceed it are resized to it."""
    window: int | None = None
    """Side of square windows, in pixels of the resized image; null uses the whole image."""
    stride: int | None = None
    """Step from window to window, at most `window`; scores are averaged where windows overlap."""
    proposals: Literal["window", "image"] = "window"
    """Whether regions are proposed in each window, or once in the resized image and then cropped to
    windows. Papers with windows (FOSSIL) do not say."""
    names: str = ""
    """Class list to use if a data set has one of this name; otherwise, and if empty, the data set's
    first."""
    background: float | None = None
    """For data sets whose first class is background: pixels whose maximum score is below this are
    background. Null for other data sets, or if background is a class like any other."""
    ask_background: bool = False
    """Whether the segmenter is also queried with the names of background; otherwise background
    consists only of pixels below the threshold."""
    seen_penalty: float = 0.0
    """Subtracted from the scores of classes that a zero-shot method was trained on."""

    def __post_init__(self) -> None:
        if self.resize == "none":
            if self.side or self.longest is not None:
                raise ValueError("side and longest must be left out if nothing is resized")
        else:
            require_at_least("side", self.side, 1)
        if self.longest is not None and self.resize != "short_side":
            raise ValueError("longest belongs to resize short_side")
        if self.longest is not None:
            require_at_least("longest", self.longest, self.side)
        if (self.window is None) != (self.stride is None):
            raise ValueError("give window and stride, or neither")
        if self.window is not None:
            require_above("window", self.window, 0)
            require_within("stride", self.stride, 1, self.window)
        require_within("seen_penalty", self.seen_penalty, 0, 1)

    def size_of(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width to which an image of this size is resized."""
        if self.resize == "none":
            return size_hw
        if self.resize == "square":
            return self.side, self.side
        if self.resize == "short_side":
            longest = self.longest or self.side * max(size_hw)
            return resized_size(size_hw, WindowConfig(
                short_side=self.side, long_side=longest, crop=1, stride=1
            ))  # fmt: skip
        scale = self.side / max(size_hw)
        return max(1, round(size_hw[0] * scale)), max(1, round(size_hw[1] * scale))

    def described(self) -> str:
        """The settings in one line, for people."""
        resized = {
            "none": "images as they are",
            "short_side": f"short side {self.side}",
            "long_side": f"long side {self.side}",
            "square": f"{self.side} x {self.side}",
        }[self.resize]
        parts = [resized + (f", long side at most {self.longest}" if self.longest else "")]
        if self.window is not None:
            parts.append(f"windows of {self.window} at stride {self.stride}")
        if self.proposals == "image":
            parts.append("regions proposed once an image")
        if self.background is not None:
            parts.append(f"background below {self.background}")
        if self.seen_penalty:
            parts.append(f"-{self.seen_penalty} for seen classes")
        return f"{self.name}: {'; '.join(parts)} ({self.source})"


_TCL = Protocol(
    name="tcl",
    source="Cha et al., CVPR 2023 (kakaobrain/tcl), with which FOSSIL and FreeDA evaluate",
    resize="short_side",
    side=448,
    longest=2048,
    window=448,
    stride=224,
    names="mmseg",
)
_CORRCLIP = Protocol(
    name="corrclip",
    source="zdk258/CorrCLIP, CorrCLIPv2/configs",
    resize="short_side",
    side=336,
    longest=2048,
    window=336,
    stride=112,
    names="corrclip",
    ask_background=True,
)
_VOCSEG = Protocol(
    name="vocseg",
    source="OVSeg's for Swin-B (ovseg_swinB_vitL_bs32_120k.yaml), which VOCSeg follows",
    resize="short_side",
    side=640,
    longest=2560,
    names="mmseg",
)
_RETCLIP = Protocol(
    name="retclip",
    source="FC-CLIP's, which RetCLIP is built on; detectron2's sizes, for it sets none on ADE20k",
    resize="short_side",
    side=800,
    longest=1333,
    names="fcclip",
)
_ZS3 = Protocol(
    name="zs3",
    source="ZegCLIP and CLIP-RC: mmsegmentation's 512 x 512 windows, generalised zero-shot",
    resize="short_side",
    side=512,
    longest=2048,
    window=512,
    stride=426,
    names="mmseg",
    seen_penalty=0.1,
)

PROTOCOLS: dict[str, Protocol] = {
    each.name: each for each in (_TCL, _CORRCLIP, _RETCLIP, _VOCSEG, _ZS3)
}
"""The named protocols, without settings specific to a data set."""

_OF_SETS: dict[tuple[str, str], dict[str, Any]] = {
    # Without TCL's pixel refinement (PAMR), which is not part of ovref; with it, 0.4.
    ("tcl", "voc21"): {"background": 0.5},
    ("tcl", "context60"): {"background": 0.5},
    ("tcl", "coco_object"): {"background": 0.5},
    ("corrclip", "ade150"): {"side": 448},
    ("corrclip", "ade847"): {"side": 448},
    ("corrclip", "cityscapes"): {"side": 784, "window": 224},
    ("corrclip", "voc21"): {"background": 0.2},
    ("corrclip", "context60"): {"background": 0.15},
    ("corrclip", "coco_object"): {"background": 0.25},
    ("retclip", "cityscapes"): {"side": 1024, "longest": 2560},
}
"""Settings of a protocol for specific data sets, from the same sources."""


def protocol_of(name: str, dataset: str = "") -> Protocol:
    """A named protocol, with its settings for a data set.

    Args:
        name: one of PROTOCOLS.
        dataset: name of a published data set, or empty.

    Raises:
        ConfigError: there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"there is no protocol {name!r}; choose from {', '.join(PROTOCOLS)}")
    return replace(PROTOCOLS[name], **_OF_SETS.get((name, dataset), {}))


def protocol_of_windows(windows: WindowConfig) -> Protocol:
    """A protocol with the settings of a segmenter's sliding windows, for other segmenters."""
    return Protocol(
        name="windows",
        source="fossil.windows",
        resize="short_side",
        side=windows.short_side,
        longest=windows.long_side,
        window=windows.crop,
        stride=windows.stride,
    )
