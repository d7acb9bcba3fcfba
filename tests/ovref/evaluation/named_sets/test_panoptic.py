"""COCO panoptic and ADE20k panoptic: segments and classes, as published and prepared."""

import json

import numpy as np
import pytest
from PIL import Image

from ovref.errors import InputError
from ovref.evaluation.named_sets.bundled_classes import bundled
from ovref.evaluation.named_sets.definitions import SETS
from ovref.evaluation.named_sets.opening import open_set

COCO = bundled("coco_panoptic", "panopticapi")


def coded(ids_hw):
    """A segment id as a colour, least significant byte first."""
    return np.stack([ids_hw % 256, ids_hw // 256 % 256, ids_hw // 65536], -1).astype(np.uint8)


@pytest.fixture
def coco(tmp_path, photo, rng):
    """Seven images as in the archives. Returns id -> (segment ids, category of each)."""
    truth, annotations = {}, []
    for number in range(7):
        name, size = f"{139 + 1000 * number:012d}", (18, 15 + number)
        chosen = rng.choice([1, 2, 90, 92, 100, 184, 200], 4, replace=False).tolist()
        ids = rng.choice(1 << 24, 4, replace=False).tolist()
        ids[0] = 255 + 256 * number  # one byte, or nearly
        segments = dict(zip(ids, chosen, strict=True))
        ids_hw = rng.choice([0, *ids], size)  # 0 is void
        if number == 2:
            ids_hw[:], segments = 0, {}  # no segment at all
        photo(tmp_path / f"coco/val2017/{name}.jpg", size)
        path = tmp_path / f"coco/annotations/panoptic_val2017/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coded(ids_hw)).save(path)
        infos = [
            {"id": i, "category_id": c, "iscrowd": int(c == 1), "area": 1, "bbox": [0, 0, 1, 1]}
            for i, c in segments.items()
        ]
        annotations.append(
            {"image_id": int(name), "file_name": f"{name}.png", "segments_info": infos}
        )
        truth[name] = (ids_hw, segments)
    photo(tmp_path / "coco/val2017/000000999999.jpg", (5, 5))  # not in the JSON file
    things = COCO["things"]
    categories = [
        {"id": i, "name": name, "isthing": int(name in things)}
        for i, (name,) in zip(COCO["ids"], COCO["classes"], strict=True)
    ]
    content = {"images": [], "annotations": annotations, "categories": categories}
    (tmp_path / "coco/annotations/panoptic_val2017.json").write_text(json.dumps(content))
    return truth


@pytest.mark.parametrize("below", ["annotations/", ""])
def test_coco_segments_classes_and_crowds(coco, tmp_path, below):
    if not below:
        folder = tmp_path / "coco/annotations/panoptic_val2017"
        folder.rename(tmp_path / "coco/panoptic_val2017")
    data = open_set("coco_panoptic", tmp_path)
    assert data.ids == tuple(coco) and len(data.class_names) == 133 and sum(data.things) == 80
    for example in data:
        ids_hw, segments = coco[example.id]
        expected_hw = [
            [COCO["ids"].index(segments[i]) if i else -1 for i in row] for row in ids_hw.tolist()
        ]
        np.testing.assert_array_equal(example.label_hw, expected_hw)
        np.testing.assert_array_equal(example.panoptic.ids_hw, ids_hw)
        assert example.panoptic.crowd == {i for i, c in segments.items() if c == 1}


def test_coco_maps_of_classes_alone(coco, tmp_path, photo, index_file, check):
    maps = {}
    for name, (ids_hw, segments) in coco.items():
        photo(tmp_path / f"prepared/coco/val2017/{name}.jpg", ids_hw.shape)
        maps[name] = np.array(
            [[COCO["ids"].index(segments[i]) if i else 255 for i in row] for row in ids_hw.tolist()]
        ).astype(np.uint8)
        index_file(tmp_path / f"prepared/coco/panoptic_semseg_val2017/{name}.png", maps[name])
    check("coco_panoptic", tmp_path / "prepared", maps, lambda v: -1 if v == 255 else v)


def test_a_png_with_other_segments_than_its_json_is_refused(coco, tmp_path):
    name = next(iter(coco))
    path = tmp_path / f"coco/annotations/panoptic_val2017/{name}.png"
    Image.fromarray(np.full((18, 15, 3), 9, np.uint8)).save(path)
    with pytest.raises(InputError, match=r"1 segments that its JSON file lacks.* 592137"):
        list(open_set("coco_panoptic", tmp_path))
    Image.fromarray(np.full((18, 15), 9, np.uint8)).save(path)
    with pytest.raises(InputError, match="mode L, expected RGB, whose colours are ids"):
        list(open_set("coco_panoptic", tmp_path))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda c: c["categories"].pop(), "132 categories from 1, the set 133 from 1"),
        (lambda c: c.pop("annotations"), "expected the member .annotations"),
        (lambda c: c["annotations"].append(c["annotations"][0]), "two annotations of the same"),
        (lambda c: c["annotations"][0]["segments_info"][0].update(category_id=12), "12 is missing"),
        (lambda c: c["annotations"][0].update(segments_info=3), "cannot read the panoptic"),
    ],
)
def test_json_files_of_another_set_or_damaged_are_refused(coco, tmp_path, spoil, message):
    path = tmp_path / "coco/annotations/panoptic_val2017.json"
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        open_set("coco_panoptic", tmp_path)


def test_an_image_of_the_json_file_that_is_missing_is_named(coco, tmp_path):
    name = next(iter(coco))
    (tmp_path / f"coco/val2017/{name}.jpg").unlink()
    with pytest.raises(InputError, match=f"lack .* for one .*val2017/{name}.jpg"):
        open_set("coco_panoptic", tmp_path)


PERSON, CAR, ROAD, SKYSCRAPER, SKY = 13, 21, 7, 49, 3
"""Values of ADE20k's map of classes; road and skyscraper share a colour in the field's palette."""


@pytest.fixture
def ade(tmp_path, photo, index_file):
    """Six images with maps of classes and of instances, which overlap differently."""
    table = {
        value: number + 1 for number, value in enumerate(bundled("ade150", "mmseg")["instances"])
    }
    base, truth = tmp_path / "ADEChallengeData2016", {}
    for number in range(1, 7):
        name = f"ADE_val_{number:08d}"
        classes_hw = np.full((12, 16), SKY, np.uint8)
        classes_hw[4:8], classes_hw[8:], classes_hw[:, 0] = SKYSCRAPER, ROAD, 0
        classes_hw[6:10, 4:6] = PERSON
        classes_hw[6:10, 10:12] = CAR  # without an instance: void
        instances_hwc = np.zeros((12, 16, 3), np.uint8)
        instances_hwc[6:10, 4:5] = (table[PERSON], 1, 0)
        instances_hwc[6:10, 5:8] = (table[PERSON], 2, 0)  # beyond the map of classes: over stuff
        instances_hwc[0:2, 0:3] = (table[CAR], 7, 0)  # over unlabelled pixels too
        photo(base / f"images/validation/{name}.jpg", (12, 16))
        index_file(base / f"annotations/validation/{name}.png", classes_hw)
        index_file(base / f"annotations_instance/validation/{name}.png", instances_hwc)
        expected = {}
        for row in range(12):
            for column in range(16):
                category, instance, _ = instances_hwc[row, column].tolist()
                value = classes_hw[row, column].item()
                if instance:
                    key = ("thing", instance, {table[PERSON]: PERSON, table[CAR]: CAR}[category])
                else:
                    key = ("stuff", 0, value) if value in (ROAD, SKYSCRAPER, SKY) else None
                expected[row, column] = key
        truth[name] = expected
    return truth


def test_ade_segments_of_stuff_and_instances(ade, tmp_path):
    data = open_set("ade_panoptic", tmp_path)
    assert data.ids == tuple(ade) and len(data.class_names) == 150
    for example in data:
        found = {}
        for (row, column), key in ade[example.id].items():
            segment = example.panoptic.ids_hw[row, column].item()
            assert (segment == 0) == (key is None)
            if key:
                assert found.setdefault(segment, key) == key
                assert example.panoptic.labels[segment] == key[2] - 1
                assert example.label_hw[row, column] == key[2] - 1
            else:
                assert example.label_hw[row, column] == -1
        assert len(set(found.values())) == len(found) == 6 == len(example.panoptic.labels)


def test_ade_prepared_as_json_and_png_is_the_same(ade, tmp_path, photo):
    published = list(open_set("ade_panoptic", tmp_path))
    base, annotations = tmp_path / "prepared/ADEChallengeData2016", []
    (base / "ade20k_panoptic_val").mkdir(parents=True)
    photo(base / "images/training/ADE_train_00000001.jpg", (5, 5))
    for example in published:
        photo(base / f"images/validation/{example.id}.jpg", (12, 16))
        ids_hw = example.panoptic.ids_hw * 70001
        Image.fromarray(coded(ids_hw)).save(base / f"ade20k_panoptic_val/{example.id}.png")
        infos = [
            {"id": i * 70001, "category_id": c, "iscrowd": 0}
            for i, c in example.panoptic.labels.items()
        ]
        annotations.append(
            {"image_id": example.id, "file_name": f"{example.id}.png", "segments_info": infos}
        )
    categories = [{"id": i, "name": str(i), "isthing": 0} for i in range(150)]
    content = {"images": [], "annotations": annotations, "categories": categories}
    (base / "ade20k_panoptic_val.json").write_text(json.dumps(content))
    prepared = list(open_set("ade_panoptic", tmp_path / "prepared"))
    for ours, theirs in zip(published, prepared, strict=True):
        np.testing.assert_array_equal(ours.label_hw, theirs.label_hw)
    things = SETS["ade_panoptic"].things
    assert {PERSON - 1, CAR - 1} < things and not {ROAD - 1, SKY - 1} & things


@pytest.mark.parametrize(
    "colour, message",
    [((101, 9, 0), r"instance 9 the categories \[101\]"), ((0, 9, 0), r"categories \[0\]")],
)
def test_ade_instances_of_no_category_are_refused(ade, tmp_path, colour, message):
    folder = tmp_path / "ADEChallengeData2016/annotations_instance/validation"
    path = folder / "ADE_val_00000001.png"
    with Image.open(path) as image:
        pixels = np.array(image)
    pixels[5, 5] = colour
    Image.fromarray(pixels).save(path)
    with pytest.raises(InputError, match=message):
        list(open_set("ade_panoptic", tmp_path))
