"""VOC 2012, as published and as FC-CLIP and CAT-Seg prepare it, with 21 and 20 classes."""

import numpy as np
import pytest
from PIL import Image

from ovref.errors import InputError
from ovref.evaluation.named_sets.opening import open_set


def voc21(value):
    return -1 if value == 255 else value


def voc20(value):
    return -1 if value in (0, 255) else value - 1


@pytest.fixture
def voc(tmp_path, photo, index_file, rng):
    """Six validation images and others, as in the published archive. Returns the index maps."""
    base = tmp_path / "VOCdevkit" / "VOC2012"
    maps = {}
    for number in range(9):
        name = f"2007_{number:06d}"
        size = (20 + number, 33 - number)
        photo(base / f"JPEGImages/{name}.jpg", size)
        if number == 8:  # an image without any segmentation, of which VOC has thousands
            continue
        values_hw = rng.integers(0, 21, size).astype(np.uint8)
        values_hw[0] = values_hw[:, -1] = 255  # void contours
        if number == 3:
            values_hw[:] = 255
        if number == 4:
            values_hw[:] = 0
        index_file(base / f"SegmentationClass/{name}.png", values_hw, palette=True)
        if number < 6:
            maps[name] = values_hw
    # In the file's own order, with Windows line ends and no last line end.
    names = [*reversed(maps)]
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    (base / "ImageSets/Segmentation/val.txt").write_bytes("\r\n".join(names).encode())
    (base / "ImageSets/Segmentation/train.txt").write_text("2007_000006\n2007_000007\n")
    return {name: maps[name] for name in names}


@pytest.mark.parametrize("root", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_published_maps_with_background(voc, tmp_path, check, root):
    data = check("voc21", tmp_path / root, voc, voc21)
    assert data.class_names[0] == "background" and len(data.class_names) == 21
    assert data.name == "voc21 val, 6 of 1449 images"


def test_published_maps_without_background(voc, tmp_path, check):
    data = check("voc20", tmp_path, voc, voc20)
    assert data.class_names[0] == "aeroplane" and len(data.class_names) == 20


def test_the_other_split(voc, tmp_path):
    assert open_set("voc21", tmp_path, "train").ids == ("2007_000006", "2007_000007")


def test_fcclips_folders(voc, tmp_path, photo, index_file, check):
    for name, values_hw in voc.items():
        base = tmp_path / "d2/pascal_voc_d2"
        photo(base / f"images/validation/{name}.jpg", values_hw.shape)
        index_file(base / f"annotations_pascal21/validation/{name}.png", values_hw)
        reduced_hw = values_hw - np.uint8(1)  # 0 becomes 255
        reduced_hw[values_hw == 255] = 255
        index_file(base / f"annotations_pascal20/validation/{name}.png", reduced_hw)
    maps = dict(sorted(voc.items()))
    check("voc21", tmp_path / "d2", maps, voc21)
    check("voc20", tmp_path / "d2", maps, voc20)


def test_catsegs_folders_with_background_last_and_void_images_left_out(
    voc, tmp_path, photo, index_file, check
):
    base = tmp_path / "catseg/VOCdevkit/VOC2012"
    kept = {}
    for name, values_hw in sorted(voc.items()):
        photo(base / f"JPEGImages/{name}.jpg", values_hw.shape)
        last_hw = np.where(values_hw == 0, 21, values_hw).astype(np.uint8) - np.uint8(1)
        last_hw[values_hw == 255] = 255
        if (last_hw == 255).all():
            continue
        kept[name] = values_hw
        index_file(base / f"annotations_detectron2_bg/val/{name}.png", last_hw)
    assert len(kept) == 5
    check("voc21", tmp_path / "catseg", kept, voc21)


def test_a_palette_resolved_to_colours_is_refused(voc, tmp_path):
    path = tmp_path / "VOCdevkit/VOC2012/SegmentationClass/2007_000002.png"
    with Image.open(path) as image:
        image.convert("RGB").save(path)
    with pytest.raises(InputError, match=r"2007_000002\.png holds colours .* palette"):
        list(open_set("voc21", tmp_path))


def test_a_palette_turned_to_grey_is_refused(voc, tmp_path):
    path = tmp_path / "VOCdevkit/VOC2012/SegmentationClass/2007_000002.png"
    with Image.open(path) as image:
        image.convert("L").save(path)
    with pytest.raises(InputError, match=r"2007_000002\.png holds the values 34, 38, 52"):
        list(open_set("voc21", tmp_path))


def test_missing_files_are_named_before_anything_is_read(voc, tmp_path):
    base = tmp_path / "VOCdevkit/VOC2012"
    (base / "SegmentationClass/2007_000001.png").unlink()
    with pytest.raises(InputError, match=r"1 images .* for one .*Class/2007_000001\.png"):
        open_set("voc21", tmp_path)
    (base / "SegmentationClass/2007_000001.png").write_bytes(b"")
    (base / "JPEGImages/2007_000000.jpg").unlink()
    with pytest.raises(InputError, match=r"for one .*JPEGImages/2007_000000\.jpg"):
        open_set("voc20", tmp_path)


def test_a_split_file_that_names_an_image_twice_is_refused(voc, tmp_path):
    path = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    path.write_text("2007_000001\n2007_000001\n")
    with pytest.raises(InputError, match="twice"):
        open_set("voc21", tmp_path)
