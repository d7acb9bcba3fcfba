"""Opening any set: class lists, splits, sizes and orientation, and what is refused."""

import tracemalloc
from itertools import islice

import numpy as np
import pytest

from ovref.errors import InputError
from ovref.evaluation.named_sets import opening
from ovref.evaluation.named_sets.definitions import SETS
from ovref.evaluation.named_sets.opening import open_set
from ovref.evaluation.named_sets.rules import labels_of_values, listed, spans

BASE = "ADEChallengeData2016"


@pytest.fixture
def ade(tmp_path, photo, index_file):
    """Writes one validation image with its labels."""

    def write(name, size, label_size=None, orientation=None):
        photo(tmp_path / BASE / f"images/validation/{name}.jpg", size, orientation)
        values_hw = np.ones(label_size or size, np.uint8)
        values_hw[0, 0] = 2
        index_file(tmp_path / BASE / f"annotations/validation/{name}.png", values_hw)

    return write


def test_unknown_sets_splits_and_lists_are_refused_with_the_choices(ade, tmp_path):
    ade("a", (5, 5))
    with pytest.raises(InputError, match=r"no data set 'ade'; choose from .*ade150"):
        open_set("ade", tmp_path)
    with pytest.raises(InputError, match="split must be one of train, val, found 'validation'"):
        open_set("ade150", tmp_path, "validation")
    with pytest.raises(InputError, match=r"no class list 'clip'; choose from mmseg, fcclip"):
        open_set("ade150", tmp_path, names="clip")
    with pytest.raises(InputError, match="does not contain ade150, split train"):
        open_set("ade150", tmp_path, "train")


def test_the_class_list_can_be_chosen(ade, tmp_path):
    ade("a", (5, 5))
    default, fcclip = open_set("ade150", tmp_path), open_set("ade150", tmp_path, names="fcclip")
    assert default.class_list.name == "mmseg" and fcclip.class_list.classes[2] == ("sky", "clouds")
    own = tmp_path / "own.txt"
    own.write_text("".join(f"thing {number}\n" for number in range(150)))
    mine = open_set("ade150", tmp_path, names=str(own))
    assert mine.class_names[149] == "thing 149"
    assert len({each.class_fingerprint for each in (default, fcclip, mine)}) == 3
    own.write_text("wall\n")
    with pytest.raises(InputError, match="has 1 classes, the data set 150"):
        open_set("ade150", tmp_path, names=str(own))


def test_label_and_image_of_different_sizes_are_refused(ade, tmp_path):
    ade("a", (6, 9))
    ade("b", (6, 9), label_size=(6, 8))
    examples = iter(open_set("ade150", tmp_path))
    assert next(examples).id == "a"
    with pytest.raises(InputError, match=r"b\.jpg is 6 x 9, its label map .*b\.png 6 x 8"):
        next(examples)


@pytest.mark.parametrize("orientation", [6, 8])
def test_a_photograph_is_turned_upright_as_its_labels_are(ade, tmp_path, orientation):
    ade("a", (6, 9), label_size=(9, 6), orientation=orientation)
    (example,) = open_set("ade150", tmp_path)
    assert example.image_hwc.shape == (9, 6, 3) and example.label_hw.shape == (9, 6)


def test_labels_of_a_photograph_s_stored_pixels_are_refused(ade, tmp_path):
    ade("a", (6, 9), label_size=(6, 9), orientation=6)
    with pytest.raises(InputError, match="drawn on the pixels as stored: rotate the map"):
        list(open_set("ade150", tmp_path))


def test_damaged_files_are_named(ade, tmp_path):
    ade("a", (5, 5))
    image = tmp_path / BASE / "images/validation/a.jpg"
    label = tmp_path / BASE / "annotations/validation/a.png"
    data = open_set("ade150", tmp_path)
    whole = label.read_bytes()
    label.write_bytes(whole[:50])
    with pytest.raises(InputError, match=r"cannot read the label map .*a\.png"):
        list(data)
    label.write_bytes(whole)
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(InputError, match=r"cannot read .*a\.jpg"):
        list(data)


def test_images_are_read_when_they_are_asked_for(ade, tmp_path, monkeypatch):
    for number in range(5):
        ade(f"{number}", (5, 5))
    read = []
    decode = opening.decode_image
    monkeypatch.setattr(opening, "decode_image", lambda file: read.append(1) or decode(file))
    data = open_set("ade150", tmp_path)
    examples = iter(data)
    assert len(data) == 5 and not read
    next(examples)
    assert len(read) == 1


def test_memory_does_not_grow_with_the_number_of_images(ade, tmp_path):
    def peak(count):
        tracemalloc.start()
        for _ in islice(open_set("ade150", tmp_path), count):
            pass
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    for number in range(24):
        ade(f"{number:02d}", (200, 300))
    peak(1)
    assert peak(24) < peak(3) + 100_000  # one image with its labels has 420,000


@pytest.mark.parametrize(
    "name, seen, unseen",
    [("voc_15_5", 15, 5), ("coco_stuff_156_15", 156, 15), ("context_50_10", 50, 10)],
)
def test_zero_shot_splits_name_classes_of_their_set(name, seen, unseen):
    named = SETS[name]
    names = opening.bundled_list(named.classes, named.lists[0]).names
    assert set(named.unseen) <= set(names) and len(named.unseen) == unseen
    assert len(names) - len(named.unseen) == seen


def test_a_zero_shot_split_marks_its_classes(tmp_path, photo, index_file):
    photo(tmp_path / "JPEGImages/a.jpg", (4, 5))
    index_file(tmp_path / "SegmentationClass/a.png", np.full((4, 5), 20, np.uint8))
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\n")
    data = open_set("voc_15_5", tmp_path, names="corrclip")
    assert data.seen == (True,) * 15 + (False,) * 5
    assert open_set("voc20", tmp_path).seen is None
    (example,) = data
    assert (example.label_hw == 19).all()


def test_values_without_meaning_are_listed():
    table = listed([3, 5], ignored=[0]).table()
    values_hw = np.array([[0, 3], [5, 3]])
    np.testing.assert_array_equal(labels_of_values(values_hw, table), [[-1, 0], [1, 0]])
    with pytest.raises(ValueError, match=r"^4, 6$"):
        labels_of_values(np.array([[0, 4], [6, 3]]), table)


def test_integers_are_shown_as_spans():
    assert spans([5, 1, 2, 3, 9]) == "1-3, 5, 9"
    assert spans(range(0, 40, 2)) == "0, 2, 4, 6, 8, 10, 12, 14, ..."
