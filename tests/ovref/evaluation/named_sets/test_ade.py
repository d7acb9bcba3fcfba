"""ADE20k: 150 classes as published and prepared, and the 847 of the full set."""

import numpy as np
import pytest
from PIL import Image

from ovref.errors import InputError
from ovref.evaluation.named_sets.bundled_classes import bundled
from ovref.evaluation.named_sets.opening import open_set

IDS_847 = bundled("ade847", "mask2former")["ids"]


def ade150(value):
    return -1 if value == 0 else value - 1


@pytest.fixture
def challenge(tmp_path, photo, index_file, rng):
    """Eight images of SceneParse150. Returns the maps of the validation images."""
    base = tmp_path / "ADEChallengeData2016"
    maps = {}
    for number in range(1, 9):
        name, size = f"ADE_val_{number:08d}", (17 + number, 40 - 2 * number)
        values_hw = rng.integers(0, 151, size).astype(np.uint8)
        if number == 2:
            values_hw[:] = 0  # nothing labelled
        if number == 5:
            values_hw[:] = 150
        photo(base / f"images/validation/{name}.jpg", size)
        index_file(base / f"annotations/validation/{name}.png", values_hw)
        maps[name] = values_hw
    photo(base / "images/training/ADE_train_00000001.jpg", (9, 9))
    index_file(base / "annotations/training/ADE_train_00000001.png", np.ones((9, 9), np.uint8))
    return maps


def test_published_maps(challenge, tmp_path, check):
    data = check("ade150", tmp_path, challenge, ade150)
    assert len(data.class_names) == 150 and data.class_names[0] == "wall"
    assert data.class_names[-1] == "flag" and data.name == "ade150 val, 8 of 2000 images"
    assert sum(data.things) == 100
    assert data.things[data.class_names.index("person")]
    assert not data.things[data.class_names.index("sky")]
    assert open_set("ade150", tmp_path, "train").ids == ("ADE_train_00000001",)


def test_prepared_maps(challenge, tmp_path, photo, index_file, check):
    base = tmp_path / "prepared/ade/ADEChallengeData2016"
    for name, values_hw in challenge.items():
        photo(base / f"images/validation/{name}.jpg", values_hw.shape)
        index_file(base / f"annotations_detectron2/validation/{name}.png", values_hw - np.uint8(1))
    check("ade150", tmp_path / "prepared", challenge, ade150)


def test_prepared_maps_in_the_place_of_published_ones_are_recognised(
    challenge, tmp_path, index_file
):
    folder = tmp_path / "ADEChallengeData2016/annotations/validation"
    for name, values_hw in challenge.items():
        index_file(folder / f"{name}.png", values_hw - np.uint8(1))
    wanted = r"holds the values 255.*These look like ADE20k's 150 classes: 0-149, 255 other"
    with pytest.raises(InputError, match=wanted):
        list(open_set("ade150", tmp_path))


def test_files_that_macos_leaves_are_no_images(challenge, tmp_path, check):
    folder = tmp_path / "ADEChallengeData2016"
    (folder / "images/validation/._ADE_val_00000001.jpg").write_bytes(b"\0\5\x16\7")
    (folder / "annotations/validation/._ADE_val_00000001.png").write_bytes(b"\0\5\x16\7")
    check("ade150", tmp_path, challenge, ade150)


def test_images_and_labels_must_be_the_same(challenge, tmp_path):
    folder = tmp_path / "ADEChallengeData2016"
    (folder / "images/validation/ADE_val_00000003.jpg").unlink()
    with pytest.raises(InputError, match=r"lack .* for one .*ADE_val_00000003\.jpg"):
        open_set("ade150", tmp_path)


def ade847(colour):
    object_id = int(colour[0] / 10) * 256 + colour[1]
    return IDS_847.index(object_id) if object_id in IDS_847 else -1


@pytest.fixture
def full(tmp_path, photo, rng):
    """Six images of ADE20K 2021_17_01, in folders of scenes. Returns the coded colours."""
    base = tmp_path / "ADE20K_2021_17_01"
    (base).mkdir()
    (base / "index_ade20k.pkl").write_bytes(b"cos\nsystem\n(S'touch /tmp/unpickled'\ntR.")
    maps = {}
    for number in range(1, 7):
        name = f"urban/street_{number % 2}/ADE_val_{number:08d}"
        size = (15 + number, 30 - number)
        ids_hw = rng.choice([*IDS_847, 0, 1, 3000], size)
        colour_hwc = np.stack([ids_hw // 256 * 10, ids_hw % 256, ids_hw * 0 + 37], -1)
        colour_hwc[0, :, 0] += 3  # the tens digit counts, the ones are the instance's
        photo(base / f"images/ADE/validation/{name}.jpg", size)
        path = base / f"images/ADE/validation/{name}_seg.png"
        Image.fromarray(colour_hwc.astype(np.uint8)).save(path)
        part = base / f"images/ADE/validation/{name}_parts_1.png"
        Image.fromarray(colour_hwc.astype(np.uint8)).save(part)
        maps[name] = colour_hwc
    return dict(sorted(maps.items()))


def test_the_full_set_as_published(full, tmp_path):
    data = open_set("ade847", tmp_path)
    assert data.ids == tuple(full) and len(data.class_names) == 847
    assert data.class_list.classes[1] == ("building", "edifice")
    for example in data:
        expected_hw = [[ade847(pixel) for pixel in row] for row in full[example.id].tolist()]
        np.testing.assert_array_equal(example.label_hw, expected_hw)


def test_the_full_set_prepared_in_16_bits(full, tmp_path, photo, index_file, rng, check):
    base = tmp_path / "prepared/ADE20K_2021_17_01"
    maps = {}
    for number, name in enumerate(f"ADE_val_{i:08d}" for i in range(6)):
        values_hw = rng.integers(0, 847, (12 + number, 20)).astype(np.uint16)
        values_hw[0], values_hw[1, :2] = 65535, (255, 846)
        photo(base / f"images_detectron2/validation/{name}.jpg", values_hw.shape)
        index_file(base / f"annotations_detectron2/validation/{name}.tif", values_hw)
        maps[name] = values_hw
    check("ade847", tmp_path / "prepared", maps, lambda v: -1 if v == 65535 else v)


def test_8_bit_maps_of_the_full_set_are_refused(tmp_path, photo, index_file):
    base = tmp_path / "ADE20K_2021_17_01"
    photo(base / "images_detectron2/validation/a.jpg", (5, 5))
    index_file(base / "annotations_detectron2/validation/a.tif", np.zeros((5, 5), np.uint8))
    with pytest.raises(InputError, match=r"a\.tif has 8 bits per pixel"):
        list(open_set("ade847", tmp_path))


@pytest.mark.parametrize("size", [(600, 1111), (700, 640), (513, 513)])
def test_the_full_set_is_judged_at_512_pixels(tmp_path, photo, size, rng):
    base = tmp_path / "ADE20K_2021_17_01/images/ADE/validation/home"
    photo(base / "a.jpg", size)
    ids_hw = rng.choice(IDS_847, size)
    colour_hwc = np.stack([ids_hw // 256 * 10, ids_hw % 256, ids_hw * 0], -1).astype(np.uint8)
    Image.fromarray(colour_hwc).save(base / "a_seg.png")
    (example,) = open_set("ade847", tmp_path)
    height, width = size
    if width >= height:
        new = (512, round(width / float(height) * 512))
    else:
        new = (round(height / float(width) * 512), 512)
    assert example.label_hw.shape == new == example.image_hwc.shape[:2]
    for row, column in rng.integers(0, 512, (40, 2)).tolist():
        pixel = colour_hwc[int(row * height / new[0]), int(column * width / new[1])]
        assert example.label_hw[row, column] == ade847(pixel.tolist())
