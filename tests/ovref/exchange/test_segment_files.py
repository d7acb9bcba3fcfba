"""Label maps, overlays, COCO and panoptic files against pycocotools and panopticapi's rule."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

from ovref.evaluation.predictions import segments_of_labels
from ovref.exchange import segment_files as files
from ovref.exchange.class_lists import read_classes
from ovref_inference.segmenters.regions import Panoptic, ScoredRegions

CLASSES = read_classes("tree,sky,dog", "dog,tree")


@pytest.fixture
def labels_hw():
    """Two parts of a tree, the sky, and some pixels without a class."""
    labels_hw = np.full((8, 12), 1, np.int32)
    labels_hw[5:, :3] = labels_hw[2:4, 8:11] = 0
    labels_hw[0, 0] = -1
    return labels_hw


def test_label_maps_of_8_and_16_bits(labels_hw):
    image = Image.open(io.BytesIO(files.label_png(labels_hw, 3)))
    assert image.mode == "P"
    wanted = np.where(labels_hw < 0, files.NO_LABEL_8, labels_hw)
    assert np.array_equal(np.asarray(image), wanted)
    colours = np.asarray(image.convert("RGB"))
    assert colours[7, 0].tolist() == files.categories(CLASSES)[0]["color"]
    assert colours[0, 0].tolist() == [0, 0, 0]
    wide = Image.open(io.BytesIO(files.label_png(labels_hw + 400 * (labels_hw > 0), 500)))
    values = np.asarray(wide)
    assert values.dtype == np.uint16 and values[0, 1] == 401 and values[0, 0] == 65535
    with pytest.raises(ValueError, match="at most 65535 classes"):
        files.label_png(labels_hw, 70_000)


def test_an_overlay_keeps_what_has_no_class(labels_hw):
    image_hwc = np.full((8, 12, 3), 100, np.uint8)
    labels_hw[:2, :2] = -1
    found = np.asarray(Image.open(io.BytesIO(files.overlay_png(image_hwc, labels_hw, 3))))
    assert found[0, 0].tolist() == [100, 100, 100] and found[0, 6].tolist() != [100, 100, 100]
    assert found[2, 0].tolist() == [255, 255, 255]  # the edge


def test_coco_reads_what_is_written(labels_hw, tmp_path):
    max_score_hw = np.linspace(0, 1, labels_hw.size, dtype=np.float32).reshape(labels_hw.shape)
    segments = segments_of_labels(labels_hw, max_score_hw, CLASSES.is_thing)
    output = files.CocoFile(files.categories(CLASSES))
    for number in (1, 2):
        annotations = files.coco_annotations(segments, number)
        image = {"id": number, "file_name": f"{number}.jpg", "height": 8, "width": 12}
        output.add(image, annotations)
    with open(tmp_path / "coco.json", "w") as file:
        output.write(file)
    coco = COCO(str(tmp_path / "coco.json"))
    assert sorted(coco.getImgIds()) == [1, 2] and len(coco.getAnnIds()) == 6
    (sky,) = coco.loadAnns(coco.getAnnIds(imgIds=2, catIds=coco.getCatIds(catNms=["sky"])))
    assert np.array_equal(coco.annToMask(sky).astype(bool), labels_hw == 1)
    assert sky["score"] == pytest.approx(max_score_hw[labels_hw == 1].mean(), abs=1e-4)
    trees = coco.loadAnns(coco.getAnnIds(imgIds=1, catIds=coco.getCatIds(catNms=["tree"])))
    assert sorted(tree["area"] for tree in trees) == [6, 9]  # each part by itself
    for tree in trees:
        assert tree["bbox"] == coco_masks.toBbox(tree["segmentation"]).tolist()


def test_panoptic_files_are_of_the_published_format(labels_hw):
    ones_hw = np.ones(labels_hw.shape, np.float32)
    segments = segments_of_labels(labels_hw, ones_hw, CLASSES.is_thing)
    rgb = np.asarray(Image.open(io.BytesIO(files.panoptic_png(segments)))).astype(np.uint32)
    ids_hw = rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2]  # panopticapi.utils.rgb2id
    annotation = files.panoptic_annotation(segments, 7, "x.png")
    assert annotation["image_id"] == 7 and annotation["file_name"] == "x.png"
    assert {info["id"] for info in annotation["segments_info"]} == set(np.unique(ids_hw)) - {0}
    for info in annotation["segments_info"]:
        mask_hw = ids_hw == info["id"]
        assert info["area"] == mask_hw.sum()
        assert set(labels_hw[mask_hw].tolist()) == {info["category_id"] - 1}
    json.dumps(annotation)


def test_ids_above_a_byte_survive():
    png = files.panoptic_png(Panoptic(ids_hw=np.array([[70_000, 300]])))
    rgb = np.asarray(Image.open(io.BytesIO(png)))
    assert (rgb.astype(int) @ [1, 256, 65536]).tolist() == [[70_000, 300]]


def test_segments_of_regions_are_one_each_of_the_best_name(labels_hw):
    """Two parts of one region stay one tree, synonyms are one class, stuff is joined."""
    classes = read_classes("tree;oak,sky,dog", "dog,tree")
    parts = [labels_hw == 0, labels_hw == 1]
    left = np.arange(12) < 6
    masks = np.stack([parts[0], parts[1] & left, parts[1] & ~left]).astype(np.float32)
    names = list(classes.query_names)
    scores = np.full((3, len(names)), 0.1, np.float32)
    scores[0, names.index("oak")] = 0.75
    scores[1:, names.index("sky")] = 0.5, 0.625
    regions = ScoredRegions(mask_probs_nhw=masks, scores_nc=scores)
    segments = files.segments_of_regions(regions, classes, min_score=0.0, overlap=0.8)
    assert segments.labels == {1: 0, 2: 1} and segments.scores == {1: 0.75, 2: 0.625}
    np.testing.assert_array_equal(segments.ids_hw, labels_hw + 1)
    few = files.segments_of_regions(regions, classes, min_score=0.7, overlap=0.8)
    assert few.labels == {1: 0}
