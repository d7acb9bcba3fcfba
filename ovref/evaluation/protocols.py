"""Protocols: what happens to an image around a segmenter, under the names of those who report it.

A score belongs to its protocol: the size that images are brought to, the windows they are cut into,
the threshold of background. So these are named and frozen, and every result says which one it has.

    protocol = protocol_of("tcl", "ade150")
    found = segment_with_protocol(segmenter, image_hwc, class_names, protocol)

Results are judged at the size of the image, with one exception that the readers of data sets make:
ADE20K's 847 classes, whose images and labels have a short side of at most 512 (Mask2Former).
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image

from ovref.errors import ConfigError
from ovref.evaluation.oracle import oracle_proposer
from ovref_inference.ranges import require_above, require_at_least, require_within
from ovref_inference.segmenters.regions import NO_CLASS, Segmentation, Segmenter
from ovref_inference.segmenters.windows import (
    WindowConfig,
    labelled,
    resize_scores,
    resized_size,
    window_boxes,
)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to bring images to a segmenter and its scores to a label map."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}

    name: str
    """What results call it."""
    source: str
    """Where the settings are from."""
    resize: Literal["none", "short_side", "long_side", "square"] = "none"
    """What is brought to `side`, whether it is larger or smaller: one side, with the aspect ratio
    kept; or both, without."""
    side: int = 0
    """Pixels; 0 with `none`."""
    longest: int | None = None
    """With `short_side`: images whose long side would be above this are brought to it instead."""
    window: int | None = None
    """Side of square windows, in pixels of the resized image; null takes it as a whole."""
    stride: int | None = None
    """Step from window to window, at most `window`; scores are averaged where windows overlap."""
    proposals: Literal["window", "image"] = "window"
    """Whether regions are proposed in each window, or once in the resized image, of which each
    window has its part. The papers with windows (FOSSIL) leave it open."""
    names: str = ""
    """The class list that belongs to it, where a data set comes with one of this name; else, and if
    empty, the data set's first."""
    background: float | None = None
    """For data sets whose first class is background: pixels whose best score is below this are
    background. Null for those without, and where background is a class like any other."""
    ask_background: bool = False
    """Whether background is asked of the segmenter too, by its words; else it has nothing but the
    pixels below the threshold."""
    seen_penalty: float = 0.0
    """Taken off the scores of classes that a zero-shot method was trained on."""

    def __post_init__(self) -> None:
        if self.resize == "none":
            if self.side or self.longest is not None:
                raise ValueError("side and longest must be left out where nothing is resized")
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
        """Height and width that an image of this size is brought to."""
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
"""The named protocols, as they are unless a data set has settings of its own."""

_OF_SETS: dict[tuple[str, str], dict[str, Any]] = {
    # Without TCL's refinement of pixels (PAMR), which is no part of this; with it 0.4.
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
"""What a protocol changes for a data set; from the same sources."""


def protocol_of(name: str, dataset: str = "") -> Protocol:
    """A named protocol, with its own settings for a data set.

    Args:
        name: one of PROTOCOLS.
        dataset: name of a set of the field, or empty.

    Raises:
        ConfigError: there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"there is no protocol {name!r}; choose from {', '.join(PROTOCOLS)}")
    return replace(PROTOCOLS[name], **_OF_SETS.get((name, dataset), {}))


def protocol_of_windows(windows: WindowConfig) -> Protocol:
    """The settings of a segmenter's own sliding windows, for those that have none."""
    return Protocol(
        name="windows",
        source="fossil.windows",
        resize="short_side",
        side=windows.short_side,
        longest=windows.long_side,
        window=windows.crop,
        stride=windows.stride,
    )


def windows_of(image_hwc: np.ndarray, protocol: Protocol) -> list[np.ndarray]:
    """The images that a segmenter sees of one image: the windows, or the resized whole.

    Args:
        image_hwc: (H, W, 3) uint8.
        protocol: sizes.
    """
    resized_hwc = _resized(image_hwc, protocol, Image.Resampling.BILINEAR)
    return [resized_hwc[t:b, left:r] for t, left, b, r in _boxes(resized_hwc.shape[:2], protocol)]


def proposed_of(image_hwc: np.ndarray, protocol: Protocol) -> list[np.ndarray]:
    """The images that regions are proposed in: the windows, or the resized whole."""
    if protocol.proposals == "window":
        return windows_of(image_hwc, protocol)
    return [_resized(image_hwc, protocol, Image.Resampling.BILINEAR)]


def label_windows_of(label_hw: np.ndarray, protocol: Protocol) -> list[np.ndarray]:
    """True labels of `windows_of`, for true masks as proposals: the nearest pixel's.

    Args:
        label_hw: (H, W) integers.
        protocol: sizes.
    """
    resized_hw = _resized(label_hw, protocol, Image.Resampling.NEAREST)
    return [resized_hw[t:b, left:r] for t, left, b, r in _boxes(resized_hw.shape[:2], protocol)]


def segment_with_protocol(
    segmenter: Segmenter,
    image_hwc: np.ndarray,
    class_names: Sequence[str],
    protocol: Protocol,
    seen: Sequence[bool] | None = None,
) -> Segmentation:
    """One image through any segmenter, as a protocol has it.

    The image is resized and cut into windows, each window is segmented as an image of its own,
    scores are averaged where windows overlap and brought to the size of the image; the best class
    of each pixel is taken there. Where a segmenter gives a class no chance in one of the windows
    (a score of -inf), the others decide; where in all, it has none.

    Args:
        segmenter: without sliding windows of its own.
        image_hwc: (H, W, 3) uint8 RGB.
        class_names: what to look for. Where the protocol has a threshold of background, the first
            is background, and asked of the segmenter only if the protocol says so.
        protocol: of `protocol_of`.
        seen: of each class, whether a zero-shot method was trained on it; needed for a penalty.

    Returns:
        A Segmentation at the size of the image, of all `class_names`.

    Raises:
        ValueError: as `segmenter.segment`; the segmenter slides windows itself; a penalty without
            `seen`.
    """
    own = getattr(getattr(segmenter, "config", segmenter), "windows", None)
    if own is not None:
        raise ValueError(
            f"{type(segmenter).__name__} slides windows of its own, which protocol "
            f"{protocol.name!r} would slide a second time: set its windows to null"
        )
    first = int(protocol.background is not None and not protocol.ask_background)
    penalty_c = np.zeros(len(class_names) - first, dtype=np.float32)
    if protocol.seen_penalty:
        if seen is None or len(seen) != len(class_names):
            raise ValueError(
                f"protocol {protocol.name!r} needs a data set whose {len(class_names)} classes are "
                "split into seen and unseen ones"
            )
        penalty_c[np.asarray(seen, dtype=bool)[first:]] = protocol.seen_penalty
    size_hw: tuple[int, int] = image_hwc.shape[:2]
    resized_hw = protocol.size_of(size_hw)
    if protocol.proposals == "image" and hasattr(segmenter, "proposer"):
        segmenter = copy(segmenter)
        segmenter.proposer = proposals_of_image(segmenter.proposer, image_hwc, protocol)
    found = [
        segmenter.segment([window_hwc], class_names[first:])[0]
        for window_hwc in windows_of(image_hwc, protocol)
    ]
    pixels = partial(
        _pixels,
        found=found,
        boxes=_boxes(resized_hw, protocol),
        resized_hw=resized_hw,
        size_hw=size_hw,
        penalty_c=penalty_c,
    )
    missing = tuple(dict.fromkeys(name for one in found for name in one.missing))
    every = np.ones(len(class_names) - first, dtype=bool)
    whole = labelled(pixels, every, size_hw, missing)
    return _with_background(whole, first, len(class_names), protocol.background)


def proposals_of_image(
    proposer: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]],
    image_hwc: np.ndarray,
    protocol: Protocol,
) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """A proposer for the windows of one image: their parts of the masks of the whole.

    Args:
        proposer: gives (n, H, W) bool masks.
        image_hwc: (H, W, 3) uint8.
        protocol: how it is cut.
    """
    resized_hwc = _resized(image_hwc, protocol, Image.Resampling.BILINEAR)
    (masks_nhw,) = proposer([resized_hwc])
    boxes = _boxes(resized_hwc.shape[:2], protocol)
    parts = [masks_nhw[:, t:b, left:r] for t, left, b, r in boxes]
    return oracle_proposer(
        windows_of(image_hwc, protocol), [part[part.any((1, 2))] for part in parts]
    )


def _with_background(
    found: Segmentation, first: int, classes: int, threshold: float | None
) -> Segmentation:
    """Labels among all classes, `first` of which were not asked; background below the threshold."""
    labels_hw = (found.labels_hw + first).astype(np.int32)
    labels_hw[found.max_score_hw == -np.inf] = NO_CLASS
    if threshold is None:
        return replace(found, labels_hw=labels_hw)
    labels_hw[found.max_score_hw < threshold] = 0
    plane_hw = np.full(labels_hw.shape, threshold, dtype=np.float32)
    scores_of = (
        partial(_scores_with_plane, scores_of=found.scores_of, plane_hw=plane_hw, count=classes)
        if first
        else found.scores_of
    )
    return replace(found, labels_hw=labels_hw, scores_of=scores_of)


def _scores_with_plane(
    classes: slice, *, scores_of: Callable[[slice], np.ndarray], plane_hw: np.ndarray, count: int
) -> np.ndarray:
    """Scores of a slice of all classes, of which the first has the same score everywhere."""
    start, stop, _ = classes.indices(count)
    others = scores_of(slice(max(start - 1, 0), max(stop - 1, 0)))
    return np.concatenate([plane_hw[None], others]) if start == 0 < stop else others


def _pixels(
    classes: slice,
    *,
    found: Sequence[Segmentation],
    boxes: Sequence[tuple[int, ...]],
    resized_hw: tuple[int, int],
    size_hw: tuple[int, int],
    penalty_c: np.ndarray,
) -> torch.Tensor:
    """(classes in the slice, *size_hw) float32: the mean over windows, at the image's size."""
    parts = [torch.from_numpy(np.ascontiguousarray(one.scores_of(classes))) for one in found]
    total_chw = parts[0].new_zeros((len(parts[0]), *resized_hw))
    count_chw = torch.zeros_like(total_chw)
    for (top, left, bottom, right), part_chw in zip(boxes, parts, strict=True):
        known_chw = torch.isfinite(part_chw)
        total_chw[:, top:bottom, left:right] += torch.where(known_chw, part_chw, 0)
        count_chw[:, top:bottom, left:right] += known_chw
    scores_chw = resize_scores(total_chw.div_(count_chw.clamp(min=1)), size_hw)
    scores_chw = scores_chw - torch.from_numpy(penalty_c[classes])[:, None, None]
    lost_chw = (count_chw == 0).float()
    if not lost_chw.any():
        return scores_chw
    # Interpolating an infinite score makes it NaN: where no window knows a class, none does.
    return torch.where(resize_scores(lost_chw, size_hw) >= 0.5, -torch.inf, scores_chw)


def _resized(map_hw: np.ndarray, protocol: Protocol, resampling: Image.Resampling) -> np.ndarray:
    size_hw = protocol.size_of(map_hw.shape[:2])
    if size_hw == map_hw.shape[:2]:
        return map_hw
    # Pillow has no integers of 16 or 64 bits that it resizes; 32 bits hold every label.
    image = Image.fromarray(map_hw if map_hw.dtype == np.uint8 else map_hw.astype(np.int32))
    return np.asarray(image.resize(size_hw[::-1], resampling))


def _boxes(size_hw: tuple[int, ...], protocol: Protocol) -> list[tuple[int, ...]]:
    """(top, left, bottom, right) of the windows, row by row; of the whole without windows."""
    if protocol.window is None or protocol.stride is None:
        return [(0, 0, size_hw[0], size_hw[1])]
    return window_boxes((size_hw[0], size_hw[1]), protocol.window, protocol.stride)
