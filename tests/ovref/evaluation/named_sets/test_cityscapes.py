"""Cityscapes: 19 of 34 label ids, and the training ids made of them."""

import numpy as np
import pytest

from ovref.errors import InputError
from ovref.evaluation.named_sets.opening import open_set

TRAIN_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
    26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip


@pytest.fixture
def city(tmp_path, photo, index_file, rng):
    """Six photographs of two cities with all files that the archives hold beside them."""
    base, maps = tmp_path / "cityscapes", {}
    for number in range(6):
        place = "frankfurt" if number < 4 else "lindau"
        name = f"{place}/{place}_{number:06d}_000019"
        values_hw = rng.integers(0, 34, (10, 20)).astype(np.uint8)
        photo(base / f"leftImg8bit/val/{name}_leftImg8bit.png", values_hw.shape)
        gt = base / "gtFine/val"
        index_file(gt / f"{name}_gtFine_labelIds.png", values_hw)
        index_file(gt / f"{name}_gtFine_instanceIds.png", values_hw.astype(np.uint16) * 1000)
        photo(gt / f"{name}_gtFine_color.png", values_hw.shape)
        (gt / f"{name}_gtFine_polygons.json").write_text("{}")
        maps[name] = values_hw
    return maps


def test_label_ids(city, tmp_path, check):
    data = check("cityscapes", tmp_path, city, lambda value: TRAIN_IDS.get(value, -1))
    assert data.class_names[0] == "road" and len(data.class_names) == 19


def test_training_ids(city, tmp_path, index_file, check):
    for name, values_hw in city.items():
        train_hw = np.vectorize(lambda value: TRAIN_IDS.get(value, 255))(values_hw)
        path = tmp_path / f"cityscapes/gtFine/val/{name}_gtFine_labelIds.png"
        path.unlink()
        index_file(path.with_name(path.name.replace("Ids", "TrainIds")), train_hw.astype(np.uint8))
    check("cityscapes", tmp_path, city, lambda value: TRAIN_IDS.get(value, -1))


def test_training_ids_under_the_name_of_label_ids_are_recognised(city, tmp_path, index_file):
    for name, values_hw in city.items():
        train_hw = np.vectorize(lambda value: TRAIN_IDS.get(value, 255))(values_hw)
        path = tmp_path / f"cityscapes/gtFine/val/{name}_gtFine_labelIds.png"
        index_file(path, train_hw.astype(np.uint8))
    with pytest.raises(InputError, match="look like Cityscapes' training ids"):
        list(open_set("cityscapes", tmp_path))
