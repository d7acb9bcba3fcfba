"""Run: pytest tests/ovref/ops/test_masks.py"""

import numpy as np
import pytest

from ovref.ops.masks import area, box_xyxy, iou, reject_reason
from ovref.records import NO, UNSURE, YES


def mask(*rows):
    """A mask drawn in letters: `#` YES, `?` UNSURE, `.` NO."""
    values = {"#": YES, "?": UNSURE, ".": NO}
    return np.array([[values[letter] for letter in row] for row in rows], dtype=np.uint8)


def test_area_counts_yes_alone():
    assert area(mask("#?.", "#..")) == 2 / 6
    assert area(mask("?")) == 0
    assert area(np.zeros((0, 5), np.uint8)) == 0


@pytest.mark.parametrize(
    ("rows", "box"),
    [
        (("#",), (0, 0, 1, 1)),
        (("...", "..#"), (2, 1, 3, 2)),
        (("#..", "...", "..#"), (0, 0, 3, 3)),
        (("?#?", "..."), (1, 0, 2, 1)),
        (("###", "###"), (0, 0, 3, 2)),
        (("?..",), None),
    ],
    ids=str,
)
def test_box(rows, box):
    assert box_xyxy(mask(*rows)) == box


def test_box_cuts_out_all_yes_pixels():
    rng = np.random.default_rng(0)
    for _ in range(20):
        m = np.where(rng.random((9, 13)) < 0.05, YES, NO).astype(np.uint8)
        box = box_xyxy(m)
        if box is None:
            assert not (m == YES).any()
            continue
        x0, y0, x1, y1 = box
        assert (m[y0:y1, x0:x1] == YES).sum() == (m == YES).sum()
        for side in (m[y0, x0:x1], m[y1 - 1, x0:x1], m[y0:y1, x0], m[y0:y1, x1 - 1]):
            assert (side == YES).any()


def test_iou():
    assert iou(mask("##.."), mask(".##.")) == 1 / 3
    assert iou(mask("##"), mask("##")) == 1
    assert iou(mask("#."), mask(".#")) == 0
    assert iou(mask("?."), mask("?.")) == 0
    with pytest.raises(ValueError, match="cannot be compared"):
        iou(mask("#"), mask("##"))


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (("....",), "empty_mask"),
        (("????",), "empty_mask"),
        (("#...",), None),
        (("###.",), None),
        (("####",), "full_mask"),
    ],
)
def test_fault(rows, reason):
    assert reject_reason(mask(*rows), min_area=0.25, max_area=0.75) == reason


def test_fault_without_limits_still_wants_a_pixel():
    assert reject_reason(mask("."), 0, 1) == "empty_mask"
    assert reject_reason(mask("#"), 0, 1) is None
    assert reject_reason(mask("#..."), 0.3, 1) == "empty_mask"
