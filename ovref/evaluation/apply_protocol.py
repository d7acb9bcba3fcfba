"""Runs any segmenter with an evaluation protocol: resizing, windows, background.

None in place of a protocol takes the image as it is.

protocol = protocol_of("tcl", "ade150")
found = segment_with_protocol(segmenter, image_hwc, class_names, protocol)
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image

from ovref.evaluation.oracle import oracle_proposer
from ovref.evaluation.protocols import Protocol
from ovref_inference.segmenters.regions import NO_CLASS, Segmentation, Segmenter
from ovref_inference.segmenters.windows import labelled, resize_scores, window_boxes


def windows_of(image_hwc: np.ndarray, protocol: Protocol | None) -> list[np.ndarray]:
    """The parts of an (H, W, 3) uint8 image given to a segmenter: its windows, or the whole resized
    image."""
    resized_hwc = _resized(image_hwc, protocol, Image.Resampling.BILINEAR)
    return [resized_hwc[t:b, left:r] for t, left, b, r in _boxes(resized_hwc.shape[:2], protocol)]


def proposal_images(image_hwc: np.ndarray, protocol: Protocol | None) -> list[np.ndarray]:
    """The images in which regions are proposed: the windows, or the whole resized image."""
    if protocol is None or protocol.proposals == "window":
        return windows_of(image_hwc, protocol)
    return [_resized(image_hwc, protocol, Image.Resampling.BILINEAR)]


def label_windows(label_hw: np.ndarray, protocol: Protocol | None) -> list[np.ndarray]:
    """The parts of an (H, W) map of true labels that belong to `windows_of`, for oracle proposals;
    resized by nearest neighbours."""
    resized_hw = _resized(label_hw, protocol, Image.Resampling.NEAREST)
    return [resized_hw[t:b, left:r] for t, left, b, r in _boxes(resized_hw.shape[:2], protocol)]


def segment_with_protocol(
    segmenter: Segmenter,
    image_hwc: np.ndarray,
    class_names: Sequence[str],
    protocol: Protocol | None,
    seen: Sequence[bool] | None = None,
) -> Segmentation:
    """Segments one image with any segmenter, following a protocol.

    The image is resized and cut into windows, each window is segmented separately, scores are
    averaged where windows overlap and resized to the image, and the best class of each pixel is
    taken. If a segmenter excludes a class in a window (a score of -inf), only the other windows
    count; if in all windows, the class stays excluded.

    Args:
        segmenter: a segmenter without sliding windows of its own.
        image_hwc: (H, W, 3) uint8 RGB.
        class_names: the classes. If the protocol has a background threshold, the first is
            background, with which the segmenter is only queried if the protocol says so.
        protocol: a protocol of `protocol_of`.
        seen: whether a zero-shot method was trained on each class; needed for a penalty.

    Returns:
        A Segmentation at the size of the image, of all `class_names`.

    Raises:
        ValueError: see `segmenter.segment`; or the segmenter slides windows itself, or there is a
            penalty but no `seen`.
    """
    if protocol is None:
        return segmenter.segment([image_hwc], class_names)[0]
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
    """A proposer for the windows of one (H, W, 3) uint8 image, which crops the (n, H, W) bool masks
    of the whole image."""
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
    """Labels among all classes, the first `first` of which were not queried, and background."""
    labels_hw = (found.labels_hw + first).astype(np.int32)
    labels_hw[found.max_score_hw == -np.inf] = NO_CLASS
    if threshold is None:
        return replace(found, labels_hw=labels_hw)
    found = replace(found, tensor_of=None)  # which knows no background
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
    """Scores of a slice of all classes, the first of which has the same score everywhere."""
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
    """(classes in the slice, *size_hw) float32: the mean over windows, at the image size, on the
    segmenter's device."""
    parts = [_part(one, classes) for one in found]
    total_chw = parts[0].new_zeros((len(parts[0]), *resized_hw))
    count_chw = torch.zeros_like(total_chw)
    for (top, left, bottom, right), part_chw in zip(boxes, parts, strict=True):
        known_chw = torch.isfinite(part_chw)
        total_chw[:, top:bottom, left:right] += torch.where(known_chw, part_chw, 0)
        count_chw[:, top:bottom, left:right] += known_chw
    scores_chw = resize_scores(total_chw.div_(count_chw.clamp(min=1)), size_hw)
    if penalty_c.any():
        penalty_c11 = torch.from_numpy(penalty_c[classes])[:, None, None]
        scores_chw = scores_chw - penalty_c11.to(scores_chw.device)
    lost_chw = (count_chw == 0).float()
    # Asking a GPU would mean to wait for it.
    if not lost_chw.is_cuda and not lost_chw.any():
        return scores_chw
    # Interpolating infinite scores would give NaN, so classes without any score are set here.
    return torch.where(resize_scores(lost_chw, size_hw) >= 0.5, -torch.inf, scores_chw)


def _part(found: Segmentation, classes: slice) -> torch.Tensor:
    if found.tensor_of is not None:
        return found.tensor_of(classes)
    return torch.from_numpy(np.ascontiguousarray(found.scores_of(classes)))


def _resized(
    map_hw: np.ndarray, protocol: Protocol | None, resampling: Image.Resampling
) -> np.ndarray:
    if protocol is None or (size_hw := protocol.size_of(map_hw.shape[:2])) == map_hw.shape[:2]:
        return map_hw
    # Pillow cannot resize 16-bit or 64-bit integers; 32 bits suffice for labels.
    image = Image.fromarray(map_hw if map_hw.dtype == np.uint8 else map_hw.astype(np.int32))
    return np.asarray(image.resize(size_hw[::-1], resampling))


def _boxes(size_hw: tuple[int, ...], protocol: Protocol | None) -> list[tuple[int, ...]]:
    """(top, left, bottom, right) of the windows, row by row; of the whole image without windows."""
    if protocol is None or protocol.window is None or protocol.stride is None:
        return [(0, 0, size_hw[0], size_hw[1])]
    return window_boxes((size_hw[0], size_hw[1]), protocol.window, protocol.stride)
