"""Pascal Context with 60, 59 and 459 classes, where 255 is a class of the last."""

import json

import numpy as np
import pytest
import scipy.io
from pycocotools import mask as coco

from ovref.errors import InputError
from ovref.evaluation.named_sets.bundled_classes import bundled_list
from ovref.evaluation.named_sets.opening import open_set

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""pycocotools hands arrays to NumPy 2 in a way that it deprecates."""

IDS_60 = (
    0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113,
    115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326,
    347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip
"""Ids of the 459 classes that the 60 are, 0 for background."""


@pytest.fixture
def names(tmp_path):
    """Six images of VOC 2010 in the validation split, in the split file's order."""
    base = tmp_path / "VOCdevkit/VOC2010/ImageSets/SegmentationContext"
    base.mkdir(parents=True)
    names = [f"2008_{number:06d}" for number in (4, 2, 9, 1, 7, 3)]
    (base / "val.txt").write_text("".join(f"{name}\n" for name in names))
    return names


@pytest.fixture
def maps60(names, tmp_path, photo, index_file, rng):
    base, maps = tmp_path / "VOCdevkit/VOC2010", {}
    for number, name in enumerate(names):
        maps[name] = rng.integers(0, 60, (14, 11 + number)).astype(np.uint8)
        photo(base / f"JPEGImages/{name}.jpg", maps[name].shape)
        index_file(base / f"SegmentationClassContext/{name}.png", maps[name])
    photo(base / "JPEGImages/2008_000100.jpg", (5, 5))
    return maps


def test_converted_maps_with_and_without_background(maps60, tmp_path, check):
    data = check("context60", tmp_path, maps60, lambda value: value)
    assert data.class_names[0] == "background" and len(data.class_names) == 60
    data = check("context59", tmp_path, maps60, lambda value: value - 1)
    assert data.class_names[:3] == ("aeroplane", "bag", "bed") and len(data.class_names) == 59


def test_the_order_of_the_classes_is_that_of_their_ids():
    all_names = bundled_list("context459", "catseg").names
    assert bundled_list("context59", "mmseg").names == tuple(all_names[i - 1] for i in IDS_60[1:])


def test_prepared_maps_without_background(maps60, tmp_path, photo, index_file, check):
    for name, values_hw in maps60.items():
        fcclip = tmp_path / "fcclip/pascal_ctx_d2"
        photo(fcclip / f"images/validation/{name}.jpg", values_hw.shape)
        index_file(fcclip / f"annotations_ctx59/validation/{name}.png", values_hw - np.uint8(1))
        catseg = tmp_path / "catseg/VOC2010"
        photo(catseg / f"JPEGImages/{name}.jpg", values_hw.shape)
        path = catseg / f"annotations_detectron2/pc59_val/{name}.png"
        index_file(path, values_hw - np.uint8(1))
    maps = dict(sorted(maps60.items()))
    for root in ("fcclip", "catseg"):
        check("context59", tmp_path / root, maps, lambda value: value - 1)


def test_maps_without_background_in_the_place_of_those_with_it(maps60, tmp_path, index_file):
    for name, values_hw in maps60.items():
        path = tmp_path / f"VOCdevkit/VOC2010/SegmentationClassContext/{name}.png"
        index_file(path, values_hw - np.uint8(1))
    for name in ("context60", "context59"):
        with pytest.raises(InputError, match="look like Context's classes without background"):
            list(open_set(name, tmp_path))


@pytest.fixture
def maps459(names, tmp_path, photo, rng):
    """MATLAB files as published: uint16 in a variable LabelMap, compressed."""
    base, maps = tmp_path / "VOCdevkit/VOC2010", {}
    (base / "trainval").mkdir()
    for number, name in enumerate(names):
        values_hw = rng.integers(1, 460, (13, 17 - number)).astype(np.uint16)
        values_hw[0, :5] = (0, 255, 256, 257, 459)
        photo(base / f"JPEGImages/{name}.jpg", values_hw.shape)
        scipy.io.savemat(
            base / f"trainval/{name}.mat", {"LabelMap": values_hw}, do_compression=True
        )
        maps[name] = values_hw
    return maps


def test_all_459_classes_as_published(maps459, tmp_path, check):
    data = check("context459", tmp_path, maps459, lambda value: value - 1)
    assert len(data.class_names) == 459
    base = tmp_path / "VOCdevkit/VOC2010"
    (base / "ImageSets/SegmentationContext/val.txt").rename(base / "pascalcontext_val.txt")
    check("context459", tmp_path, maps459, lambda value: value - 1)


@pytest.mark.parametrize(
    "images, labels",
    [
        ("pascal_ctx_d2/images/validation", "pascal_ctx_d2/annotations_ctx459/validation"),
        ("VOC2010/JPEGImages", "VOC2010/annotations_detectron2/pc459_val"),
    ],
)
def test_16_bit_tiff_files_in_which_255_is_a_class(
    maps459, tmp_path, photo, index_file, check, images, labels
):
    base = tmp_path / "prepared"
    for name, values_hw in maps459.items():
        photo(base / images / f"{name}.jpg", values_hw.shape)
        index_file(base / labels / f"{name}.tif", values_hw - np.uint16(1))  # 0 becomes 65535
    maps = dict(sorted(maps459.items()))
    data = check("context459", base, maps, lambda value: value - 1)
    assert any((example.label_hw == 255).any() for example in data)


def test_8_bit_maps_for_459_classes_are_refused(maps459, tmp_path, photo, index_file):
    base = tmp_path / "prepared/pascal_ctx_d2"
    photo(base / "images/validation/a.jpg", (4, 4))
    path = base / "annotations_ctx459/validation/a.tif"
    index_file(path, np.full((4, 4), 255, np.uint8))
    with pytest.raises(InputError, match=r"a\.tif has 8 bits per pixel, .* ids above 255 are lost"):
        list(open_set("context459", tmp_path / "prepared"))
    name = next(iter(maps459))
    mat = tmp_path / f"VOCdevkit/VOC2010/trainval/{name}.mat"
    scipy.io.savemat(mat, {"LabelMap": maps459[name].astype(np.uint8)})
    with pytest.raises(InputError, match="LabelMap of 8 bits"):
        list(open_set("context459", tmp_path))


@pytest.mark.parametrize("content", [b"", b"MATLAB 5.0 MAT-file, " + b"\0" * 200, b"\x80\x04."])
def test_damaged_matlab_files_are_named(maps459, tmp_path, content):
    path = tmp_path / f"VOCdevkit/VOC2010/trainval/{next(iter(maps459))}.mat"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"cannot read LabelMap of {path}"):
        list(open_set("context459", tmp_path))


def test_a_matlab_file_without_the_variable_is_named(maps459, tmp_path):
    path = tmp_path / f"VOCdevkit/VOC2010/trainval/{next(iter(maps459))}.mat"
    scipy.io.savemat(path, {"Labels": np.ones((4, 4), np.uint16)})
    with pytest.raises(InputError, match=f"cannot read LabelMap of {path}"):
        list(open_set("context459", tmp_path))
    scipy.io.savemat(path, {"LabelMap": np.ones((4, 4))})
    with pytest.raises(InputError, match=r"LabelMap of float64 .*expected \(H, W\) integers"):
        list(open_set("context459", tmp_path))


def run_lengths(mask_hw):
    """COCO's run lengths by pycocotools, as the published file has them."""
    encoded = coco.encode(np.asfortranarray(mask_hw.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


@pytest.fixture
def merged(tmp_path, photo, rng):
    """`trainval_merged.json` with six images to judge and one of training; the maps of ids."""
    base, maps, images, masks = tmp_path / "VOCdevkit/VOC2010", {}, [], []
    for number in range(7):
        name, phase = f"2008_{number + 3:06d}", "train" if number == 6 else "val"
        ids_hw = rng.choice(IDS_60, (14, 11 + number))
        photo(base / f"JPEGImages/{name}.jpg", ids_hw.shape)
        image = {"file_name": f"{name}.jpg", "image_id": 2008000003 + number, "phase": phase}
        images.append(image | {"height": 14, "width": 11 + number})
        # A mask below all others, which later ones cover.
        masks.append((image["image_id"], 72, np.ones(ids_hw.shape)))
        for label in np.unique(ids_hw[ids_hw > 0]).tolist():
            masks.append((image["image_id"], label, ids_hw == label))
        if phase == "val":
            maps[name] = np.where(ids_hw == 0, 72, ids_hw)
            maps[name][0, 0] = 0
            masks.append((image["image_id"], 0, np.indices(ids_hw.shape).sum(0) == 0))
    content = {
        "info": {},
        "images": images,
        "annos_boundary": [{"boundary_map": [1, 2]}],
        "annos_segmentation": [
            {"image_id": image, "category_id": label, "segmentation": run_lengths(mask_hw)}
            for image, label, mask_hw in masks
        ],
    }
    path = base / "trainval_merged.json"
    path.write_text(json.dumps(content))
    return maps, path, content


def test_published_masks_of_60_classes(merged, tmp_path, check):
    maps, *_ = merged
    data = check("context60", tmp_path, maps, IDS_60.index)
    assert "PASCAL in Detail" in data.convention
    check("context59", tmp_path, maps, lambda value: IDS_60.index(value) - 1)
    assert len(open_set("context_50_10", tmp_path, "train")) == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("annos_segmentation"), "cannot read .*annos_segmentation"),
        (lambda c: c["images"][0].pop("phase"), "cannot read .*phase"),
        (lambda c: c["images"].clear(), "no masks of the phase val"),
        (lambda c: c["annos_segmentation"][1].update(category_id=3), "holds the values 3"),
        (lambda c: c["annos_segmentation"][1]["segmentation"].update(size=[3, 3]), "broken mask"),
        (lambda c: c["images"][0].update(file_name="2007_1.jpg"), "lack their image"),
    ],
)
def test_other_masks_are_refused(merged, tmp_path, spoil, message):
    _, path, content = merged
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        list(open_set("context60", tmp_path))
