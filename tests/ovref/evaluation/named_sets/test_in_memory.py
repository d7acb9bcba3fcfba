"""Named sets in memory, with the byte that means ignored there."""

import numpy as np
import pytest

from ovref.errors import InputError
from ovref.evaluation.metrics import confusion
from ovref.evaluation.named_sets.in_memory import in_memory
from ovref.evaluation.named_sets.opening import open_set


@pytest.fixture
def voc(tmp_path, photo, index_file, rng):
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    names = ["b", "a", "c"]
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("\n".join(names))
    for name in names:
        values_hw = rng.choice([*range(21), 255], (8, 9)).astype(np.uint8)
        photo(tmp_path / f"JPEGImages/{name}.jpg", (8, 9))
        index_file(tmp_path / f"SegmentationClass/{name}.png", values_hw)
    return tmp_path


def test_labels_names_and_split_of_the_set(voc):
    opened = open_set("voc_15_5", voc)
    data = in_memory(opened)
    assert data.classes == opened.class_names and data.seen == opened.seen
    assert data.name == "voc_15_5 val, 3 of 1449 images" and data.panoptic is None
    for image, label, example in zip(data.images, data.labels, opened, strict=True):
        assert label.dtype == np.uint8 and image.shape == (8, 9, 3)
        np.testing.assert_array_equal(
            np.where(label == 255, -1, label.astype(int)), example.label_hw
        )
    assert confusion(data.labels[0], np.zeros((8, 9), int), 20).sum() < 72  # void is not counted


def test_a_limit_is_said_in_the_name(voc):
    data = in_memory(open_set("voc21", voc), 2)
    assert len(data.images) == 2 and data.name == "voc21 val, 3 of 1449 images, the first 2"


def test_more_classes_than_a_byte_holds_are_refused(tmp_path, photo, index_file):
    photo(tmp_path / "images/validation/a.jpg", (4, 4))
    index_file(tmp_path / "annotations_ctx459/validation/a.tif", np.ones((4, 4), np.uint16))
    with pytest.raises(InputError, match="459 classes; a data set in memory has at most 255"):
        in_memory(open_set("context459", tmp_path))
