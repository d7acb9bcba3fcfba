"""COCO-Stuff with 171 classes of 182 ids, and COCO-Object with 80 of them and background."""

import numpy as np
import pytest

from ovref.errors import InputError
from ovref.evaluation.named_sets.opening import open_set

ABSENT = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
PRESENT = [value for value in range(182) if value not in ABSENT]


def stuff(value):
    return -1 if value == 255 else PRESENT.index(value)


def thing_or_background(value):
    return 0 if value > 90 else PRESENT.index(value) + 1


@pytest.fixture
def raw(tmp_path, photo, index_file, rng):
    """Six images with the published stuff-and-thing maps, in the archives' own folders."""
    maps = {}
    for number in range(6):
        name = f"{1000 + number * 77:012d}"
        values_hw = rng.choice([*PRESENT, 255], (16, 12 + number)).astype(np.uint8)
        if number == 1:
            values_hw[:] = 255  # an image without any label
        photo(tmp_path / f"raw/val2017/{name}.jpg", values_hw.shape)
        index_file(tmp_path / f"raw/stuffthingmaps/val2017/{name}.png", values_hw)
        maps[name] = values_hw
    return maps


def test_published_maps(raw, tmp_path, check):
    data = check("coco_stuff", tmp_path / "raw", raw, stuff)
    assert len(data.class_names) == 171 and sum(data.things) == 80
    assert [data.class_names[i] for i in (0, 11, 79, 80, 170)] == [
        "person", "stop sign", "toothbrush", "banner", "wood",
    ]  # fmt: skip


def test_objects_of_the_published_maps_with_all_else_as_background(raw, tmp_path, check):
    data = check("coco_object", tmp_path / "raw", raw, thing_or_background)
    assert data.class_names[0] == "background" and len(data.class_names) == 81
    check("coco80", tmp_path / "raw", raw, lambda value: thing_or_background(value) - 1)


def converted(values_hw, rule):
    """As a converter writes them: ignored pixels are 255."""
    return np.array([[rule(v) % 256 for v in row] for row in values_hw.tolist()], dtype=np.uint8)


def test_mmsegmentations_folder_with_three_files_an_image(raw, tmp_path, photo, index_file, check):
    base = tmp_path / "mmseg/coco_stuff164k"
    for name, values_hw in raw.items():
        photo(base / f"images/val2017/{name}.jpg", values_hw.shape)
        folder = base / "annotations/val2017"
        index_file(folder / f"{name}_labelTrainIds.png", converted(values_hw, stuff))
        objects_hw = converted(values_hw, thing_or_background)
        index_file(folder / f"{name}_instanceTrainIds.png", objects_hw)
    expected = {
        "coco_stuff": stuff,
        "coco_object": thing_or_background,
        "coco80": lambda value: thing_or_background(value) - 1,
    }
    for published_too in (False, True):
        for name, rule in expected.items():
            data = check(name, tmp_path / "mmseg", raw, rule)
            assert ("as published" in data.convention) == published_too
        for name, values_hw in raw.items():
            index_file(base / f"annotations/val2017/{name}.png", values_hw)


@pytest.mark.parametrize("folder", ["annotations_detectron2", "stuffthingmaps_detectron2"])
def test_prepared_maps(raw, tmp_path, photo, index_file, check, folder):
    base = tmp_path / "prepared/coco-stuff"
    for name, values_hw in raw.items():
        photo(base / f"images/val2017/{name}.jpg", values_hw.shape)
        index_file(base / folder / f"val2017/{name}.png", converted(values_hw, stuff))
    check("coco_stuff", tmp_path / "prepared", raw, stuff)


def test_raw_ids_under_a_converted_name_are_recognised(raw, tmp_path, photo, index_file):
    base = tmp_path / "mixed"
    for name, values_hw in raw.items():
        photo(base / f"images/val2017/{name}.jpg", values_hw.shape)
        index_file(base / f"annotations/val2017/{name}_labelTrainIds.png", values_hw)
    wanted = r"These look like raw COCO-Stuff ids: 0-181, 11 of them absent, .*coco_stuff"
    with pytest.raises(InputError, match=wanted):
        list(open_set("coco_stuff", base))


def test_converted_ids_under_a_raw_name_are_recognised(raw, tmp_path, index_file):
    for name, values_hw in raw.items():
        path = tmp_path / f"raw/stuffthingmaps/val2017/{name}.png"
        index_file(path, converted(values_hw, stuff))
    for name in ("coco_stuff", "coco_object", "coco80"):
        with pytest.raises(InputError, match="These look like converted COCO-Stuff ids: 0-170"):
            list(open_set(name, tmp_path / "raw"))


def test_coco_json_ids_which_are_one_more_are_refused(raw, tmp_path, index_file):
    for name, values_hw in raw.items():
        path = tmp_path / f"raw/stuffthingmaps/val2017/{name}.png"
        index_file(path, np.where(values_hw == 255, 0, values_hw + 1).astype(np.uint8))
    with pytest.raises(InputError, match=r"holds the values .*182.* coco_stuff does not have"):
        list(open_set("coco_stuff", tmp_path / "raw"))


def test_nothing_found_says_what_was_looked_for(tmp_path):
    with pytest.raises(InputError) as caught:
        open_set("coco_stuff", tmp_path)
    for path in (
        "val2017/*.jpg or images/val2017/*.jpg with stuffthingmaps/val2017/*.png",
        "annotations/val2017/*_labelTrainIds.png",
        "coco_stuff164k",
    ):
        assert path in str(caught.value)
