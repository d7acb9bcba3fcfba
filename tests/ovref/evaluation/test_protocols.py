"""Protocols: their published settings, and one image through them as plain loops would do it."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ovref.errors import ConfigError
from ovref.evaluation.apply_protocol import (
    label_windows,
    proposal_images,
    segment_with_protocol,
    windows_of,
)
from ovref.evaluation.named_sets.definitions import SETS
from ovref.evaluation.protocols import PROTOCOLS, Protocol, protocol_of, protocol_of_windows
from ovref_inference.segmenters.regions import NO_CLASS, Segmentation
from ovref_inference.segmenters.windows import WindowConfig, window_boxes

SMALL = Protocol(
    name="small", source="this test", resize="short_side", side=12, longest=40, window=8, stride=5
)
NAMES = ["red", "green", "blue"]


class Channels:
    """Class c scores the c-th channel of each pixel, as the window shows it, and its mean there."""

    def __init__(self, silent=(), missing=()):
        self.asked, self.silent, self.missing = [], silent, missing

    def segment(self, images, names):
        self.asked.append((list(names), [image.shape[:2] for image in images]))
        return [self._one(image_hwc, len(names)) for image_hwc in images]

    def _one(self, image_hwc, classes):
        shares_hwc = image_hwc / np.float32(255)
        scores_chw = (shares_hwc + shares_hwc.mean((0, 1))).transpose(2, 0, 1)[:classes] / 2
        for number in self.silent:
            scores_chw[number] = -np.inf
        return Segmentation(
            labels_hw=scores_chw.argmax(0).astype(np.int32),
            max_score_hw=scores_chw.max(0),
            scores_of=lambda classes: scores_chw[classes],
            missing=self.missing,
        )


def picture(size_hw, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


def slow_bilinear(scores_chw, size_hw):
    """Between cell centres, clamped at the edges, pixel by pixel."""
    _, h, w = scores_chw.shape
    found = np.zeros((len(scores_chw), *size_hw))
    for y in range(size_hw[0]):
        for x in range(size_hw[1]):
            v = np.clip((y + 0.5) * h / size_hw[0] - 0.5, 0, h - 1)
            u = np.clip((x + 0.5) * w / size_hw[1] - 0.5, 0, w - 1)
            top, left = int(v), int(u)
            down, right = min(top + 1, h - 1), min(left + 1, w - 1)
            dv, du = v - top, u - left
            above = (1 - du) * scores_chw[:, top, left] + du * scores_chw[:, top, right]
            below = (1 - du) * scores_chw[:, down, left] + du * scores_chw[:, down, right]
            found[:, y, x] = (1 - dv) * above + dv * below
    return found


def slow_scores(image_hwc, protocol):
    """Windows by stepping until the edge is reached, and every average by hand."""
    height, width = protocol.size_of(image_hwc.shape[:2])
    resized = np.asarray(
        Image.fromarray(image_hwc).resize((width, height), Image.Resampling.BILINEAR)
    )
    total, count = np.zeros((3, height, width)), np.zeros((height, width))
    tops, lefts = ([0], [0])
    for starts, length in ((tops, height), (lefts, width)):
        while starts[-1] + protocol.window < length:
            starts.append(min(starts[-1] + protocol.stride, length - protocol.window))
    for top in tops:
        for left in lefts:
            part = resized[top : top + protocol.window, left : left + protocol.window]
            (found,) = Channels().segment([part], NAMES)
            total[:, top : top + 8, left : left + 8] += found.scores_chw
            count[top : top + 8, left : left + 8] += 1
    return slow_bilinear(total / count, image_hwc.shape[:2])


@pytest.mark.parametrize("size_hw", [(20, 33), (33, 20), (9, 9), (6, 40)])
def test_an_image_goes_through_windows_as_plain_loops_take_it(size_hw):
    image_hwc = picture(size_hw)
    found = segment_with_protocol(Channels(), image_hwc, NAMES, SMALL)
    expected_chw = slow_scores(image_hwc, SMALL)
    np.testing.assert_allclose(found.scores_chw, expected_chw, atol=1e-5)
    np.testing.assert_allclose(found.max_score_hw, expected_chw.max(0), atol=1e-5)
    ordered = np.sort(expected_chw, axis=0)
    clear = ordered[-1] - ordered[-2] > 1e-4
    assert (found.labels_hw == expected_chw.argmax(0))[clear].all() and clear.mean() > 0.98
    np.testing.assert_array_equal(found.scores_of(slice(1, 2))[0], found.scores_chw[1])


def test_without_windows_and_resizing_the_segmenter_has_the_last_word():
    image_hwc = picture((7, 9))
    plain = Protocol(name="plain", source="this test")
    segmenter = Channels()
    found = segment_with_protocol(segmenter, image_hwc, NAMES, plain)
    (own,) = Channels().segment([image_hwc], NAMES)
    np.testing.assert_array_equal(found.labels_hw, own.labels_hw)
    np.testing.assert_array_equal(found.scores_chw, own.scores_chw)
    assert segmenter.asked == [(NAMES, [(7, 9)])]


@pytest.mark.parametrize(
    ("resize", "side", "longest", "size_hw", "expected"),
    [
        ("none", 0, None, (30, 50), (30, 50)),
        ("short_side", 40, None, (30, 60), (40, 80)),
        ("short_side", 40, None, (60, 30), (80, 40)),
        ("short_side", 40, 50, (30, 60), (25, 50)),
        ("long_side", 40, None, (30, 60), (20, 40)),
        ("long_side", 40, None, (9000, 3), (40, 1)),
        ("square", 40, None, (30, 60), (40, 40)),
    ],
)
def test_sizes(resize, side, longest, size_hw, expected):
    protocol = Protocol(name="x", source="y", resize=resize, side=side, longest=longest)
    assert protocol.size_of(size_hw) == expected
    (whole,) = windows_of(picture(size_hw), protocol)
    assert whole.shape == (*expected, 3)


def test_background_is_what_no_class_reaches_and_is_not_asked():
    protocol = replace(SMALL, background=0.6)
    names, segmenter = ["background", *NAMES], Channels()
    image_hwc = picture((12, 15))
    found = segment_with_protocol(segmenter, image_hwc, names, protocol)
    assert all(asked == NAMES for asked, _ in segmenter.asked)
    scores_chw = slow_scores(image_hwc, SMALL)
    clear = np.abs(scores_chw.max(0) - 0.6) > 1e-4
    expected = np.where(scores_chw.max(0) < 0.6, 0, scores_chw.argmax(0) + 1)
    assert (found.labels_hw == expected)[clear].mean() > 0.98
    assert {0, 1, 2, 3} <= set(np.unique(found.labels_hw))
    assert found.scores_chw.shape == (4, 12, 15) and (found.scores_chw[0] == np.float32(0.6)).all()
    for part in (slice(0, 1), slice(1, 3), slice(2, 4), slice(0, 4)):
        np.testing.assert_array_equal(found.scores_of(part), found.scores_chw[part])


def test_background_may_be_asked_by_its_words_too():
    protocol = replace(SMALL, background=0.6, ask_background=True)
    segmenter, image_hwc = Channels(), picture((12, 15))
    found = segment_with_protocol(segmenter, image_hwc, NAMES, protocol)
    assert all(asked == NAMES for asked, _ in segmenter.asked)
    scores_chw = slow_scores(image_hwc, SMALL)
    clear = np.abs(scores_chw.max(0) - 0.6) > 1e-4
    expected = np.where(scores_chw.max(0) < 0.6, 0, scores_chw.argmax(0))
    assert (found.labels_hw == expected)[clear].mean() > 0.98


def test_seen_classes_lose_the_penalty():
    protocol, image_hwc = replace(SMALL, seen_penalty=0.1), picture((14, 12))
    found = segment_with_protocol(Channels(), image_hwc, NAMES, protocol, seen=[True, False, True])
    expected_chw = slow_scores(image_hwc, SMALL) - np.array([0.1, 0, 0.1])[:, None, None]
    np.testing.assert_allclose(found.scores_chw, expected_chw, atol=1e-5)
    assert (found.labels_hw == expected_chw.argmax(0)).mean() > 0.98
    for seen in (None, [True]):
        with pytest.raises(ValueError, match="split into seen and unseen"):
            segment_with_protocol(Channels(), image_hwc, NAMES, protocol, seen)


def test_a_class_without_support_has_no_pixel_and_no_score_becomes_nan():
    segmenter = Channels(silent=(1,), missing=("green",))
    found = segment_with_protocol(segmenter, picture((20, 30)), NAMES, SMALL)
    assert found.missing == ("green",) and 1 not in found.labels_hw
    assert (found.scores_chw[1] == -np.inf).all() and np.isfinite(found.scores_chw[[0, 2]]).all()
    none = segment_with_protocol(Channels(silent=(0, 1, 2)), picture((9, 9)), NAMES, SMALL)
    assert (none.labels_hw == NO_CLASS).all()


def test_a_window_that_knows_a_class_decides_where_others_do_not():
    image_hwc = picture((8, 13))
    # The left window gives red no chance; the right one, from column 5 on, gives it all of it.
    protocol = replace(SMALL, resize="none", side=0, longest=None)
    answers = iter([-np.inf, 1.0])

    class Turns:
        def segment(self, images, names):
            scores_chw = np.zeros((3, *images[0].shape[:2]), np.float32)
            scores_chw[0] = next(answers)
            return [Segmentation(
                labels_hw=scores_chw.argmax(0), max_score_hw=scores_chw.max(0),
                scores_of=lambda part: scores_chw[part],
            )]  # fmt: skip

    found = segment_with_protocol(Turns(), image_hwc, NAMES, protocol)
    assert (found.scores_chw[0, :, :5] == -np.inf).all() and (found.labels_hw[:, :5] == 1).all()
    assert (found.scores_chw[0, :, 5:] == 1).all() and (found.labels_hw[:, 5:] == 0).all()


def test_windows_are_not_slid_twice():
    segmenter = Channels()
    segmenter.windows = WindowConfig()
    with pytest.raises(ValueError, match="slides windows of its own"):
        segment_with_protocol(segmenter, picture((9, 9)), NAMES, SMALL)


def test_regions_may_be_proposed_once_an_image():
    image_hwc, asked = picture((20, 30)), []
    protocol = replace(SMALL, proposals="image")
    height, width = protocol.size_of((20, 30))
    whole_nhw = np.zeros((2, height, width), bool)
    whole_nhw[0, :3], whole_nhw[1, 5:, 9:] = True, True

    def propose(images):
        asked.extend(image.shape[:2] for image in images)
        return [whole_nhw for _ in images]

    class Regions(Channels):
        proposer = staticmethod(propose)

        def segment(self, images, names):
            self.seen.append(self.proposer(images)[0])
            return super().segment(images, names)

    segmenter = Regions()
    segmenter.seen = []
    segment_with_protocol(segmenter, image_hwc, NAMES, protocol)
    assert asked == [(height, width)] and segmenter.proposer is propose
    boxes = window_boxes((height, width), 8, 5)
    for masks_nhw, (top, left, bottom, right) in zip(segmenter.seen, boxes, strict=True):
        parts = [mask[top:bottom, left:right] for mask in whole_nhw]
        kept = [part for part in parts if part.any()]
        assert len(masks_nhw) == len(kept)
        for mask, part in zip(masks_nhw, kept, strict=True):
            np.testing.assert_array_equal(mask, part)
    assert "proposed once an image" in protocol.described()
    (whole,) = proposal_images(image_hwc, protocol)
    assert whole.shape == (height, width, 3)
    parts, windows = proposal_images(image_hwc, SMALL), windows_of(image_hwc, SMALL)
    assert all(np.array_equal(a, b) for a, b in zip(parts, windows, strict=True))


def test_true_labels_are_cut_as_the_image_is():
    label_hw = np.arange(20 * 30).reshape(20, 30) % 847
    parts = label_windows(label_hw, SMALL)
    images = windows_of(np.repeat(label_hw[..., None], 3, 2).astype(np.uint8), SMALL)
    assert [part.shape for part in parts] == [image.shape[:2] for image in images]
    height, width = SMALL.size_of((20, 30))
    rows = [int((y + 0.5) * 20 / height) for y in range(height)]
    columns = [int((x + 0.5) * 30 / width) for x in range(width)]
    np.testing.assert_array_equal(parts[0], label_hw[np.ix_(rows[:8], columns[:8])])


def test_the_published_settings():
    def row(name, dataset):
        found = protocol_of(name, dataset)
        return found.side, found.longest, found.window, found.stride, found.background, found.names

    # kakaobrain/tcl, segmentation/configs: img_scale=(2048, 448), crop 448, stride 224.
    assert row("tcl", "ade150") == (448, 2048, 448, 224, None, "mmseg")
    assert row("tcl", "voc21") == (448, 2048, 448, 224, 0.5, "mmseg")
    # zdk258/CorrCLIP, CorrCLIPv2/configs/cfg_*.py.
    assert row("corrclip", "voc20") == (336, 2048, 336, 112, None, "corrclip")
    assert row("corrclip", "ade847") == (448, 2048, 336, 112, None, "corrclip")
    assert row("corrclip", "cityscapes") == (784, 2048, 224, 112, None, "corrclip")
    thresholds = [row("corrclip", each)[4] for each in ("voc21", "context60", "coco_object")]
    assert thresholds == [0.2, 0.15, 0.25]
    # facebookresearch/ov-seg, configs/ovseg_swinB_vitL_bs32_120k.yaml: MIN_ and MAX_SIZE_TEST.
    assert row("vocseg", "context459") == (640, 2560, None, None, None, "mmseg")
    # bytedance/fc-clip sets no sizes but for Cityscapes and Mapillary: detectron2's 800 and 1333.
    assert row("retclip", "ade_panoptic") == (800, 1333, None, None, None, "fcclip")
    assert row("retclip", "cityscapes") == (1024, 2560, None, None, None, "fcclip")
    assert row("zs3", "voc_15_5") == (512, 2048, 512, 426, None, "mmseg")
    assert protocol_of("zs3", "voc_15_5").seen_penalty == 0.1
    for (name, protocol), dataset in zip(PROTOCOLS.items(), SETS, strict=False):
        assert protocol.name == name and protocol.source in protocol_of(name, dataset).described()


def test_a_line_says_all_of_it():
    assert protocol_of("corrclip", "voc21").described() == (
        "corrclip: short side 336, long side at most 2048; windows of 336 at stride 112; "
        "background below 0.2 (zdk258/CorrCLIP, CorrCLIPv2/configs)"
    )
    assert "-0.1 for seen classes" in protocol_of("zs3").described()
    own = protocol_of_windows(WindowConfig(short_side=64, long_side=99, crop=48, stride=24))
    assert "short side 64, long side at most 99; windows of 48 at stride 24" in own.described()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize": "none"}, "must be left out"),
        ({"side": 0}, "side must be at least 1"),
        ({"longest": 11}, "longest must be at least 12"),
        ({"resize": "square"}, "longest belongs to"),
        ({"stride": None}, "window and stride, or neither"),
        ({"stride": 9}, "stride must be in"),
        ({"seen_penalty": 2.0}, "seen_penalty"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)
    with pytest.raises(ConfigError, match=r"no protocol 'tlc'.*tcl, corrclip"):
        protocol_of("tlc")
