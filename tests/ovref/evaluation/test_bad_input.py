"""Labels that do not fit their set: a clear error before any model is loaded; nothing is scored."""

import json

import numpy as np
import pytest
from PIL import Image

from ovref.errors import InputError
from ovref.evaluation import cached
from ovref.evaluation.evaluate import evaluate
from ovref.evaluation.named_sets.label_folder import LabelFolder
from ovref.evaluation.spec import EvaluateSpec


@pytest.fixture
def refused(collection_url, tmp_path, monkeypatch):
    """Evaluates and gives the message of the error."""

    def load(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(cached, "load_region_encoder", load)
    monkeypatch.setattr(cached, "load_text_encoder", load)

    def run(**settings):
        output = tmp_path / "out"
        spec = EvaluateSpec(collection=collection_url, output=str(output), **settings)
        with pytest.raises(InputError) as caught:
            evaluate(spec, lambda line: None, device="cpu")
        assert not list(output.glob("scores/_commits/*"))
        assert not (output / "evaluation.json").exists()
        return str(caught.value)

    return run


def write(path, values_hw, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values_hw))
    if palette:
        image.putpalette(palette)
    image.save(path)


@pytest.fixture
def folder(tmp_path):
    """Three images with labels of three classes."""
    for name in "abc":
        write(tmp_path / f"images/{name}.jpg", np.full((4, 6, 3), 99, np.uint8))
        write(tmp_path / f"labels/{name}.png", np.full((4, 6), 2, np.uint8))
    (tmp_path / "classes.txt").write_text("sky\nred panda\ngrass\n")
    return LabelFolder(
        images=str(tmp_path / "images"),
        labels=str(tmp_path / "labels"),
        classes=str(tmp_path / "classes.txt"),
    )


@pytest.fixture
def context459(tmp_path):
    write(tmp_path / "images/validation/a.jpg", np.full((4, 4, 3), 99, np.uint8))

    def labelled(values_hw):
        write(tmp_path / "annotations_ctx459/validation/a.tif", values_hw)
        return {"dataset": "context459", "root": str(tmp_path)}

    return labelled


def test_a_value_outside_of_the_class_list_in_the_last_image(refused, folder, tmp_path):
    write(tmp_path / "labels/c.png", np.array([[0, 1, 2, 3, 7, 255]] * 4, np.uint8))
    message = refused(folder=folder)
    assert "c.png holds the values 3, 7; with 3 classes from 0 the last is 2" in message
    assert "check the class list, first_label and ignored" in message


def test_8_bit_maps_of_459_classes(refused, context459):
    message = refused(**context459(np.full((4, 4), 9, np.uint8)))
    assert "a.tif has 8 bits per pixel, but this set has more classes" in message


def test_label_and_image_of_different_sizes(refused, folder, tmp_path):
    write(tmp_path / "labels/b.png", np.zeros((6, 4), np.uint8))
    message = refused(folder=folder)
    assert "b.jpg is 4 x 6, its label map" in message and "6 x 4 (height x width)" in message
    assert "EXIF" in message


def test_a_class_list_of_another_length(refused, context459, folder):
    settings = context459(np.zeros((4, 4), np.uint16))
    assert "has 3 classes, the data set 459" in refused(**settings, names=folder.classes)


def test_a_palette_that_was_resolved_to_colours(refused, folder, tmp_path):
    write(tmp_path / "labels/a.png", np.zeros((4, 6, 3), np.uint8))
    assert "a.png holds colours (RGB), expected one class index" in refused(folder=folder)


def test_class_names_that_differ_in_case_alone(refused, folder, tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nRed panda\nred Panda\n")
    assert "has the class 'red Panda' twice, ignoring case" in refused(folder=folder)


def test_a_byte_order_mark_is_no_part_of_the_first_name(folder, tmp_path):
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfsky\r\nred panda\r\ngrass\r\n")
    spec = EvaluateSpec(collection="x", output="y", folder=folder)
    assert spec.open_data().class_names == ("sky", "red panda", "grass")


def test_ids_that_fit_another_set_better(refused, tmp_path):
    """COCO-Stuff as published, in the place of the map that mmsegmentation makes of it."""
    write(tmp_path / "val2017/a.jpg", np.full((4, 4, 3), 99, np.uint8))
    values_hw = np.array([[0, 13, 91, 181]] * 4, np.uint8)
    path = tmp_path / "annotations/val2017/a_labelTrainIds.png"
    write(path, values_hw)
    message = refused(dataset="coco_stuff", root=str(tmp_path))
    assert "a_labelTrainIds.png holds the values 181" in message
    assert "These look like raw COCO-Stuff ids: 0-181, 11 of them absent" in message


def test_a_damaged_photograph(refused, folder, tmp_path):
    path = tmp_path / "images/c.jpg"
    path.write_bytes(path.read_bytes()[:100])
    assert "cannot read" in refused(folder=folder) and "c.jpg" in refused(folder=folder)


def test_an_image_without_labels(refused, folder, tmp_path):
    (tmp_path / "labels/b.png").unlink()
    assert "1 of 3 images in" in refused(folder=folder)


def test_no_pixel_has_a_class(refused, folder, tmp_path):
    for name in "abc":
        write(tmp_path / f"labels/{name}.png", np.full((4, 6), 255, np.uint8))
    for _ in range(2):  # nothing is left that a second run would take for checked
        assert "no pixel of images, 3 images has a class: all are void" in refused(folder=folder)


def test_two_images_with_one_label_map(refused, folder, tmp_path):
    write(tmp_path / "images/b.png", np.full((4, 6, 3), 9, np.uint8))
    assert "b.jpg and b.png in" in refused(folder=folder)


SKY, GRASS = {"id": 3, "name": "sky"}, {"id": 7, "name": "grass"}
IMAGE = {"id": 1, "file_name": "a.jpg", "height": 4, "width": 6}
OTHER = {"id": 2, "file_name": "b.jpg", "height": 4, "width": 6}
MASK = {"image_id": 1, "category_id": 3, "segmentation": [[0, 0, 3, 0, 3, 3]]}


@pytest.mark.parametrize(
    ("categories", "images", "annotations", "message"),
    [
        ([SKY, GRASS | {"name": "Sky"}], [IMAGE], [MASK], "the class 'Sky' twice, ignoring case"),
        ([SKY, GRASS | {"name": " "}], [IMAGE], [MASK], "category 7 has no name"),
        ([SKY, GRASS], [IMAGE, OTHER | {"id": 1}], [MASK], "two images have the id 1"),
        ([SKY, GRASS], [IMAGE], [MASK | {"category_id": 9}],
         "a.jpg: an annotation has category_id 9, no category has that id"),
        ([SKY, GRASS], [IMAGE], [{"image_id": 1, "category_id": 3}],
         "a.jpg: an annotation has no 'segmentation'"),
        ([SKY, GRASS], [IMAGE], [], "no pixel of labels, 1 images has a class"),
    ],
)  # fmt: skip
def test_coco_annotations(categories, images, annotations, message, refused, folder, tmp_path):
    path = tmp_path / "labels.json"
    tree = {"categories": categories, "images": images, "annotations": annotations}
    path.write_text(json.dumps(tree))
    assert message in refused(folder=LabelFolder(images=folder.images, labels=str(path)))
