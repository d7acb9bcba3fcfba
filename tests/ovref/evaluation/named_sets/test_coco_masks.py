"""COCO JSON masks: drawn as pycocotools draws them, smaller over larger, crowds ignored."""

import json

import numpy as np
import pytest
from pycocotools import mask as reference

from ovref.errors import InputError
from ovref.evaluation.named_sets.coco_masks import open_coco_masks
from ovref.evaluation.named_sets.label_folder import LabelFolder, open_label_folder
from ovref.ops.run_lengths import mask_of

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""pycocotools hands arrays to NumPy 2 in a way that it deprecates."""


def test_a_rectangle_of_whole_pixels():
    mask_hw = mask_of([[1, 1, 4, 1, 4, 3, 1, 3]], (5, 6))
    assert mask_hw.sum() == 6 and mask_hw[1:3, 1:4].all()


def test_polygons_of_a_list_are_one_mask():
    triangle = [0, 0, 30, 0, 0, 40]
    both_hw = mask_of([triangle, [30, 30, 40, 30, 40, 40, 30, 40]], (40, 40))
    rows, columns = np.indices((40, 40)) + 0.5
    inside_hw = rows / 40 + columns / 30 < 1
    assert (both_hw != inside_hw)[:30].mean() < 0.03  # pixels on the edge
    assert both_hw[30:, 30:].all() and both_hw.sum() == both_hw[:, :30].sum() + 100
    assert not mask_of([], (3, 2)).any() and mask_of([], (3, 2)).shape == (3, 2)


def test_run_lengths_are_decoded_as_by_pycocotools(rng):
    for _ in range(100):
        size = tuple(rng.integers(1, 70, 2).tolist())
        mask_hw = np.kron(rng.integers(0, 2, size), np.ones((3, 2))).astype(np.uint8)
        encoded = reference.encode(np.asfortranarray(mask_hw))
        text = {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
        np.testing.assert_array_equal(mask_of(text, mask_hw.shape), mask_hw.astype(bool))
        flat = mask_hw.T.ravel()
        edges = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff([0, *edges, flat.size]).tolist()
        plain = {"size": list(mask_hw.shape), "counts": [0, *counts] if flat[0] else counts}
        np.testing.assert_array_equal(mask_of(plain, mask_hw.shape), mask_hw.astype(bool))


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ({"size": [4, 5], "counts": [20]}, "a mask has size"),
        ({"size": [5, 4], "counts": [3, 4]}, "do not fill"),
        ([[1, 2, 3, 4]], "4 numbers"),
    ],
)
def test_masks_that_do_not_fit_are_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        mask_of(segmentation, (5, 4))


@pytest.fixture
def coco(tmp_path, photo):
    """Six images, the last without any mask; ids of categories with gaps and out of order."""
    images, annotations = [], []
    for number in range(6):
        photo(tmp_path / f"images/{number}.jpg", (12, 15))
        images.append({"id": 50 - number, "file_name": f"{number}.jpg", "height": 12, "width": 15})
        # A small mask, a larger one under it, a crowd under both.
        boxes = [(1, 0, 3, 3), (90, 0, 8, 9), (90, 1, 12, 12)]
        for category, crowd, height, width in boxes if number < 5 else []:
            annotations.append(
                {
                    "image_id": 50 - number,
                    "category_id": category,
                    "iscrowd": crowd,
                    "segmentation": [[0, 0, width, 0, width, height, 0, height]],
                }
            )
    categories = [{"id": 90, "name": "dog"}, {"id": 1, "name": "cat"}, {"id": 40, "name": "cow"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return tmp_path / "images", path, content


def test_label_maps_of_instances(coco):
    images, path, _ = coco
    data = open_coco_masks(images, path)
    assert data.class_names == ("cat", "cow", "dog") and len(data) == 6
    for number, example in enumerate(data):
        expected_hw = np.full((12, 15), -1)
        if number < 5:
            expected_hw[:8, :9] = 2
            expected_hw[:3, :3] = 0
        np.testing.assert_array_equal(example.label_hw, expected_hw)


def test_each_mask_is_a_segment(coco):
    images, path, content = coco
    content["categories"][2]["isthing"] = 0
    path.write_text(json.dumps(content))
    data = open_coco_masks(images, path)
    assert data.things == (True, False, True)
    first, *_, last = data
    panoptic = first.panoptic
    areas = {panoptic.labels[i]: int((panoptic.ids_hw == i).sum()) for i in panoptic.labels}
    assert len(panoptic.labels) == 3 and len(panoptic.crowd) == 1
    (crowd,) = panoptic.crowd
    assert panoptic.labels[crowd] == 2 and (panoptic.ids_hw == crowd).sum() == 12 * 12 - 8 * 9
    assert areas[0] == 9 and last.panoptic.labels == {}


def test_background_is_a_class_where_it_is_named(coco):
    images, path, _ = coco
    data = open_coco_masks(images, path, background="background")
    assert data.class_names == ("background", "cat", "cow", "dog")
    first, *_, last = data
    assert first.label_hw[0, 14] == 0 and first.label_hw[0, 11] == -1  # rest, crowd
    assert first.label_hw[0, 0] == 1 and (last.label_hw == 0).all()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda c: c.pop("categories"), "cannot read the COCO annotations"),
        (lambda c: c.update(categories=[]), "no categories"),
        (lambda c: c.update(images=[]), "no images"),
        (lambda c: c["images"][0].update(file_name="9.jpg"), "lacks 1 images .* 9.jpg"),
        (lambda c: c["images"][0].update(height=15, width=12), "is 12 x 15, its label map"),
        (lambda c: c["annotations"][0].update(category_id=2), "0.jpg: .* has category_id 2"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2]]), "2 numbers"),
    ],
)
def test_files_that_do_not_fit_are_refused(coco, spoil, message):
    images, path, content = coco
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        list(open_coco_masks(images, path))


def test_annotations_are_the_labels_of_a_folder(coco):
    images, path, _ = coco
    folder = LabelFolder(
        images=str(images), labels=str(path), background="rest", unseen=("cow",)
    )  # fmt: skip
    data = open_label_folder(folder)
    assert data.class_names == ("rest", "cat", "cow", "dog")
    assert data.seen == (True, True, False, True) and data.things == (False, True, True, True)
    with pytest.raises(ValueError, match="have their own"):
        LabelFolder(images="a", labels="b.json", classes="c")
    with pytest.raises(ValueError, match="must name the class list"):
        LabelFolder(images="a", labels="b")
    with pytest.raises(ValueError, match="background is for COCO"):
        LabelFolder(images="a", labels="b", classes="c", background="rest")
