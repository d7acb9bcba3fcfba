"""The miniature's scenes in every layout of every data set: what is read, and what it scores."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from labelled_scenes import run_lengths
from ovref.evaluation.datasets import open_scenes
from ovref.evaluation.evaluate import evaluate
from ovref.evaluation.named_sets import opening
from ovref.evaluation.named_sets.bundled_classes import bundled_list
from ovref.evaluation.named_sets.definitions import SETS
from ovref.evaluation.named_sets.label_folder import LabelFolder
from ovref.evaluation.named_sets.layouts import NamedSet
from ovref.evaluation.named_sets.sets_scenes import ADE_INSTANCES
from ovref.evaluation.spec import EvaluateSpec
from ovref.miniature.shapes import CLASSES, THINGS
from ovref_inference.segmenters.fossil import FossilConfig

LAYOUTS = [(name, number) for name, one in SETS.items() for number in range(len(one.layouts))]


@pytest.fixture(scope="module")
def scenes():
    return list(open_scenes("test", 2))


def places_of(named: NamedSet) -> list[int]:
    """The set's class that each class of the scenes is: things are things, where that is known;
    those for which the set has no place are left out (-1)."""
    count = len(bundled_list(named.classes, named.lists[0]).classes)
    if named.things is None:
        return [place if place < count else -1 for place in range(len(CLASSES))]
    things, stuff = sorted(named.things), sorted(set(range(count)) - named.things)
    return [(things if name in THINGS else stuff).pop(0) for name in CLASSES]


def class_file(named, path):
    """A class list with the names of scenes in their places."""
    count = len(bundled_list(named.classes, named.lists[0]).classes)
    names = [f"xqzt {number}" for number in range(count)]
    for name, place in zip(CLASSES, places_of(named), strict=True):
        if place >= 0:
            names[place] = name
    path.write_text("\n".join(names) + "\n")
    return path


def write(root, named, layout, scenes):
    """Scenes in a layout of a set."""
    base, split = root / layout.bases[-1], layout.splits["val"]
    value_of = {label: value for value, label in reversed(layout.rule.classes.items())}
    void = min(layout.rule.ignored, default=None)
    values = np.array([value_of.get(place, void) for place in places_of(named)])
    ids = [f"ulm/ulm_{scene.id}" for scene in scenes]
    if layout.reader == "panoptic" or layout.listed_by not in ("images", "labels"):
        ids = [f"2008_00000{scene.id}" for scene in scenes]

    def place(template, image_id):
        path = base / template.format(split=split, id=image_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    listed = []
    for number, (image_id, scene) in enumerate(zip(ids, scenes, strict=True)):
        # Without loss, so that the pixels are those of the scene; decoders go by the content.
        Image.fromarray(scene.image_hwc).save(place(layout.images[0], image_id), "PNG")
        path, values_hw = place(layout.labels, image_id), values[scene.label_hw]
        if layout.reader in ("index", "ade_instances"):
            dtype = np.uint16 if layout.rule.bits == 16 else np.uint8
            Image.fromarray(values_hw.astype(dtype)).save(path)
        if layout.reader == "ade_full":
            save_colours(path, values_hw // 256 * 10 + 3, values_hw % 256)
        if layout.reader == "mat":
            savemat(path, {"LabelMap": values_hw.astype(np.uint16)})
        if layout.reader == "ade_instances":
            save_instances(place(layout.instances, image_id), named, scene)
        if layout.reader == "panoptic":
            ids_hw = scene.panoptic.ids_hw + 300
            save_colours(path, ids_hw % 256, ids_hw // 256)
            infos = [
                {"id": id_ + 300, "category_id": int(values[label])}
                for id_, label in scene.panoptic.labels.items()
            ]
            listed.append({"file_name": f"{image_id}.png", "segments_info": infos})
        if layout.reader == "context_json":
            listed += [
                {"image_id": number, "category_id": value,
                 "segmentation": run_lengths(values_hw == value)}
                for value in np.unique(values_hw).tolist() if value
            ]  # fmt: skip
    if layout.reader == "panoptic":
        categories = [{"id": value} for value in layout.rule.classes]
        content = json.dumps({"categories": categories, "annotations": listed})
        place(layout.listed_by, "").write_text(content)
    elif layout.reader == "context_json":
        images = [
            {"image_id": number, "file_name": f"{image_id}.jpg", "phase": "val",
             "height": 64, "width": 64}
            for number, image_id in enumerate(ids)
        ]  # fmt: skip
        content = json.dumps({"images": images, "annos_segmentation": listed})
        place(layout.labels, "").write_text(content)
    elif layout.listed_by not in ("images", "labels"):
        place(layout.listed_by, "").write_text("\n".join(ids))


def save_colours(path, red_hw, green_hw):
    colour_hwc = np.stack([red_hw, green_hw, red_hw * 0], -1)
    Image.fromarray(colour_hwc.astype(np.uint8)).save(path)


def save_instances(path, named, scene):
    category_hw, instance_hw = np.zeros((2, *scene.label_hw.shape), np.int64)
    for id_, label in scene.panoptic.labels.items():
        if CLASSES[label] in THINGS:
            mask_hw = scene.panoptic.ids_hw == id_
            category_hw[mask_hw] = ADE_INSTANCES.index(places_of(named)[label]) + 1
            instance_hw[mask_hw] = id_
    save_colours(path, category_hw, instance_hw)


def only(layout, name, monkeypatch):
    """Leaves a set one layout."""
    named = replace(SETS[name], layouts=(layout,))
    monkeypatch.setitem(opening.SETS, name, named)
    return named


@pytest.mark.parametrize(("name", "number"), LAYOUTS)
def test_scenes_are_read_as_they_are(name, number, scenes, tmp_path, monkeypatch):
    layout = SETS[name].layouts[number]
    if "val" not in layout.splits:
        layout = replace(layout, splits={"val": layout.splits["train"]})
    named = only(layout, name, monkeypatch)
    write(tmp_path, named, layout, scenes)
    places = np.array(places_of(named))
    data = opening.open_set(name, tmp_path)
    for example, scene in zip(data, scenes, strict=True):
        np.testing.assert_array_equal(example.image_hwc, scene.image_hwc)
        np.testing.assert_array_equal(example.label_hw, places[scene.label_hw])
        if example.panoptic is not None:
            found = segments(example.panoptic, range(len(data.class_names)))
            assert found == segments(scene.panoptic, places)


def segments(panoptic, places):
    return sorted(
        (int(places[label]), *np.flatnonzero(panoptic.ids_hw == id_).tolist())
        for id_, label in panoptic.labels.items()
    )


@pytest.fixture(scope="module")
def spec(collection_url, tmp_path_factory):
    return EvaluateSpec(
        collection=collection_url, output=str(tmp_path_factory.mktemp("run") / "scenes"), scenes=2,
        rows=("fossil_no_proposals",), fossil=FossilConfig(n=10, k=2, windows=None), pictures=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def of_scenes(spec):
    return evaluate(spec, lambda line: None, device="cpu")


def scores(result):
    return {row["class"]: row["iou"] for row in result["per_class"] if row["class"] in CLASSES}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_scenes_score_in_a_set_what_they_score_as_scenes(
    name, spec, of_scenes, scenes, tmp_path, monkeypatch
):
    named = SETS[name]
    layout = next(one for one in named.layouts if "val" in one.splits)
    named = only(layout, name, monkeypatch)
    write(tmp_path, named, layout, scenes)
    names = class_file(named, tmp_path / "names.txt")
    spec = replace(spec, dataset=name, root=str(tmp_path), names=str(names))
    found = evaluate(replace(spec, output=str(tmp_path / "out")), lambda line: None, device="cpu")
    expected = of_scenes
    if -1 in places_of(named):  # fewer classes than scenes have: some pixels are not evaluated
        expected = evaluate(
            replace(
                spec, dataset="", root="", names="", output=str(tmp_path / "folder_out"),
                folder=label_folder(tmp_path / "folder", named, scenes, names),
            ),
            lambda line: None, device="cpu",
        )  # fmt: skip
    assert scores(found) == scores(expected) and found["images"] == 2
    (row,), (other,) = found["rows"], expected["rows"]
    judged = {"miou", "mean_accuracy", "pixel_accuracy"}
    if layout.reader in ("panoptic", "ade_instances"):
        judged |= {"pq", "sq", "rq", "ap"}
    assert {metric: row[metric] for metric in judged} == {
        metric: other[metric] for metric in judged
    }
    assert 0.2 < row["miou"] <= 1 and layout.what in found["convention"]


def label_folder(root, named, scenes, names):
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    places = np.array(places_of(named))
    for scene in scenes:
        Image.fromarray(scene.image_hwc).save(root / f"images/{scene.id}.png")
        labels_hw = places[scene.label_hw].astype(np.uint8)
        Image.fromarray(labels_hw).save(root / f"labels/{scene.id}.png")
    return LabelFolder(images=str(root / "images"), labels=str(root / "labels"), classes=str(names))
