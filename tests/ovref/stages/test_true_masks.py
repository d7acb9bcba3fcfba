"""The stage of true masks: regions of segments, and what becomes of those that do not fit."""

import io

import numpy as np
import pytest
from PIL import Image

from ovref.check_models import check_models
from ovref.config import dump, parse
from ovref.contract import Dropped
from ovref.records import YES, Noun, Prompt, Segments
from ovref.stages.true_masks import TrueMasks
from ovref.stored_images import MAX_SIDE

NOUNS = tuple(Noun(text=text, start=0, end=1) for text in ("sky", "tree", "oak"))


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def prompt(numbers_hw, nouns=((0,), (1,)), size_hw=None, key="a", **changes):
    height, width = size_hw or numbers_hw.shape
    values = {
        "key": key,
        "caption": "sky, tree, oak",
        "nouns": NOUNS,
        "source": "set:1",
        "image": png(np.full((height, width, 3), 90, np.uint8)),
        "segments": Segments(nouns=nouns, map_png=png(numbers_hw.astype(np.uint16))),
    }
    return Prompt(**values | changes)


def halves(size_hw=(20, 30)):
    numbers_hw = np.ones(size_hw, int)
    numbers_hw[:, size_hw[1] // 2 :] = 2
    return numbers_hw


def run(*prompts, **settings):
    return list(TrueMasks(**settings).build()(iter(prompts)))


def test_each_segment_is_a_region_of_its_label():
    numbers_hw = halves()
    numbers_hw[3:5] = 0
    (record,) = run(prompt(numbers_hw))
    assert [region.noun for region in record.regions] == [NOUNS[0], NOUNS[1]]
    for number, region in enumerate(record.regions, start=1):
        np.testing.assert_array_equal(region.mask_hw == YES, numbers_hw == number)
        assert region.score == 1.0 and region.source == "labels"
    assert record.caption == "sky, tree, oak" and record.image == prompt(numbers_hw).image


def test_two_segments_of_a_label_are_two_regions_and_synonyms_are_regions_of_each_name():
    (record,) = run(prompt(halves(), nouns=((1, 2), (1, 2))))
    assert [region.noun.text for region in record.regions] == ["tree", "oak", "tree", "oak"]


def test_masks_too_small_or_too_large_are_dropped_by_their_noun():
    numbers_hw = np.ones((40, 40), int)
    numbers_hw[0, 0] = 2
    small, full, record = run(prompt(numbers_hw), max_area=0.9)
    assert (small, full) == (Dropped("a#0", "full_mask"), Dropped("a#1", "empty_mask"))
    assert record == Dropped("a", "no_regions")
    dropped, record = run(prompt(numbers_hw), max_area=1.0)
    assert dropped == Dropped("a#1", "empty_mask") and len(record.regions) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": None}, "no_image"),
        ({"segments": None}, "no_masks"),
        ({"image": b"\xff\xd8\xff broken"}, "corrupt_image"),
        ({"size_hw": (30, 20)}, "wrong_mask_size"),
    ],
)
def test_what_has_no_masks_is_dropped(changes, reason):
    assert run(prompt(halves(), **changes)) == [Dropped("a", reason)]


def test_masks_follow_a_photograph_that_is_made_smaller():
    size_hw = (200, MAX_SIDE + 952)  # 2048 wide when it is stored
    (record,) = run(prompt(halves(size_hw)))
    height, width = record.regions[0].mask_hw.shape
    assert (height, width) == record.image_hwc().shape[:2] == (137, MAX_SIDE)
    for number, region in enumerate(record.regions):
        assert (region.mask_hw == YES).sum() == height * width // 2
        assert (region.mask_hw[:, number * width // 2] == YES).all()


def test_settings_are_checked_and_no_model_is_loaded():
    spec = TrueMasks(min_area=0.01)
    assert parse(TrueMasks, dump(spec)) == spec
    assert check_models([spec]) == ()
    with pytest.raises(ValueError, match="ordered"):
        TrueMasks(min_area=0.5, max_area=0.2)
