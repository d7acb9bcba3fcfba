"""Held-out scenes and label folders: labelled by position in the class list, nothing mistaken."""

import numpy as np
import pytest
from PIL import Image

from ovref.config import dump, parse
from ovref.errors import ConfigError, InputError
from ovref.evaluation.datasets import open_scenes, panoptic_truth, true_instances
from ovref.evaluation.metrics_panoptic import TruePanoptic
from ovref.evaluation.named_sets.label_folder import LabelFolder, open_label_folder
from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES, STUFF, THINGS
from paper_tables.datasets import in_memory, miniature_scenes, with_unseen


def test_scenes_are_the_same_every_time_and_a_prefix_of_more_scenes():
    few, more = miniature_scenes("test", 3), miniature_scenes("test", 5)
    for index in range(3):
        np.testing.assert_array_equal(few.images[index], more.images[index])
        np.testing.assert_array_equal(few.labels[index], more.labels[index])
    assert few.class_fingerprint == more.class_fingerprint


def test_labels_are_positions_in_the_class_list():
    data = miniature_scenes("validation", 20)
    assert len(data.images) == len(data.labels) == 20
    for image, label in zip(data.images, data.labels, strict=True):
        assert image.shape == (*label.shape, 3) and label.max() < len(data.classes)


def test_scenes_are_drawn_when_they_are_asked_for():
    opened, data = open_scenes("test", 3), miniature_scenes("test", 3)
    assert opened.ids == ("0", "1", "2") and opened.class_names == data.classes
    one = opened.read("1")
    np.testing.assert_array_equal(one.label_hw, data.labels[1])
    np.testing.assert_array_equal(one.panoptic.ids_hw, data.panoptic[1].ids_hw)


def test_splits_differ():
    test, validation = miniature_scenes("test", 1), miniature_scenes("validation", 1)
    assert not np.array_equal(test.images[0], validation.images[0])


def test_training_scenes_and_no_scenes_are_refused():
    with pytest.raises(ValueError, match="split must be one of"):
        miniature_scenes("train", 3)
    with pytest.raises(ValueError, match="count must be at least 1"):
        miniature_scenes("test", 0)


def test_scenes_have_every_visible_thing_and_stuff_as_one_segment():
    data = miniature_scenes("test", 40)
    assert [name for name, thing in zip(data.classes, data.things, strict=True) if thing] == [
        *THINGS
    ]
    several = 0
    for seed, (label_hw, panoptic) in enumerate(zip(data.labels, data.panoptic, strict=True)):
        assert (panoptic.ids_hw > 0).all() and not panoptic.crowd
        names = np.array([-1, *panoptic.labels.values()])
        np.testing.assert_array_equal(names[panoptic.ids_hw], label_hw)
        things = [label for label in panoptic.labels.values() if data.things[label]]
        instances = render(seed, "test").instance_hw
        assert len(things) == len(np.unique(instances[instances > 0]))
        stuff = [label for label in panoptic.labels.values() if not data.things[label]]
        assert sorted(stuff) == sorted({v for v in np.unique(label_hw) if CLASSES[v] in STUFF})
        several += len(things) > len(set(things))
    assert several > 0


def test_void_belongs_to_no_segment_and_instances_have_one_class():
    label_hw = np.array([[3, 3, -1], [1, -1, 2]])
    panoptic = panoptic_truth(label_hw, np.array([[2, 7, 0], [0, 5, 0]]))
    assert panoptic.labels == {1: 3, 2: 3, 3: 1, 4: 2}
    np.testing.assert_array_equal(panoptic.ids_hw, [[1, 2, 0], [3, 0, 4]])
    with pytest.raises(ValueError, match=r"instance 1 has pixels of several classes: \[1, 3\]"):
        panoptic_truth(np.array([[1, 3]]), np.array([[1, 1]]))
    with pytest.raises(ValueError, match="shapes differ"):
        panoptic_truth(np.zeros((1, 2)), np.zeros((2, 1)))


def test_instances_are_the_segments_of_things():
    panoptic = TruePanoptic(
        ids_hw=np.array([[1, 2, 3, 0]]), labels={1: 0, 2: 1, 3: 1}, crowd=frozenset({3})
    )
    found = true_instances(panoptic, (False, True))
    np.testing.assert_array_equal(found.masks_nhw, [[[0, 1, 0, 0]], [[0, 0, 1, 0]]])
    assert found.labels.tolist() == [1, 1] and found.crowd.tolist() == [False, True]
    assert true_instances(panoptic, (False, False)).masks_nhw.shape == (0, 1, 4)


def test_classes_are_split_by_name():
    data = with_unseen(miniature_scenes("test", 1), ["sky", "kite"])
    assert [n for n, s in zip(data.classes, data.seen, strict=True) if not s] == ["sky", "kite"]
    with pytest.raises(InputError, match=r"unseen classes \['unicorn'\]"):
        with_unseen(data, ["sky", "unicorn"])
    with pytest.raises(InputError, match="at least one class must be seen"):
        with_unseen(data, data.classes)


@pytest.fixture
def folder(tmp_path):
    """Two images, one in a folder of its own, labels from 1, 0 and 255 without a class."""
    for name, values in (("a", [[0, 1], [2, 255]]), ("deep/b", [[3, 3], [1, 9]])):
        image, label = tmp_path / f"images/{name}.jpg", tmp_path / f"labels/{name}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        label.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), 90).save(image)
        Image.fromarray(np.array(values, np.uint8)).save(label)
    (tmp_path / "classes.txt").write_text("sky\nred panda\n\n grass \n")
    return LabelFolder(
        images=str(tmp_path / "images"),
        labels=str(tmp_path / "labels"),
        classes=str(tmp_path / "classes.txt"),
        first_label=1,
        ignored=(9, 255),
        unseen=("red panda",),
    )


def label_folder(folder):
    return in_memory(open_label_folder(folder))


def changed(folder, **changes):
    return parse(LabelFolder, dump(folder) | changes)


def test_a_label_folder_is_read_by_its_convention(folder):
    data = label_folder(folder)
    assert data.classes == ("sky", "red panda", "grass") and data.seen == (True, False, True)
    assert [image.shape for image in data.images] == [(2, 2, 3)] * 2
    np.testing.assert_array_equal(data.labels[0], [[-1, 0], [1, -1]])
    np.testing.assert_array_equal(data.labels[1], [[2, 2], [0, -1]])
    assert data.panoptic is None and data.things is None
    assert open_label_folder(folder).first(1).ids == ("a.jpg",)
    assert open_label_folder(folder).first(1).name == "images, 2 images, the first 1"
    from_two = label_folder(changed(folder, first_label=2))
    np.testing.assert_array_equal(from_two.labels, [[[-1, -1], [0, -1]], [[1, 1], [-1, -1]]])
    other = changed(folder, first_label=0, ignored=[3, 9, 255])
    assert label_folder(other).class_fingerprint != data.class_fingerprint


def test_images_are_decoded_as_those_of_a_build(folder, tmp_path):
    """Upright by EXIF, alpha over white, 16 bits to 8, and every format."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {
        "turned.jpg": (Image.new("L", (3, 2), 90), {"exif": exif}, (3, 2)),
        "clear.png": (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), {}, (2, 2)),
        "grey.png": (Image.new("LA", (2, 2), (9, 255)), {}, (2, 2)),
        "deep.png": (Image.fromarray(np.full((2, 2), 0x8080, np.uint16)), {}, (2, 2)),
        "web.webp": (Image.new("RGB", (2, 2), (1, 2, 3)), {"lossless": True}, (2, 2)),
        "bitmap.BMP": (Image.fromarray(rng.integers(0, 255, (2, 2, 3), np.uint8)), {}, (2, 2)),
    }
    root = tmp_path / "more"
    for name, (image, options, size_hw) in images.items():
        for kind in ("images", "labels"):
            (root / kind).mkdir(parents=True, exist_ok=True)
        image.save(root / "images" / name, **options)
        label = (root / "labels" / name).with_suffix(".png")
        Image.new("L", size_hw[::-1], 1).save(label)
    data = label_folder(changed(folder, images=str(root / "images"), labels=str(root / "labels")))
    found = dict(zip(sorted(images), data.images, strict=True))
    assert found["turned.jpg"].shape == (3, 2, 3)
    assert (found["clear.png"] == 255).all() and (found["grey.png"] == 9).all()
    assert (found["deep.png"] == 0x80).all() and found["web.webp"][0, 0].tolist() == [1, 2, 3]


def test_hidden_files_are_left_out_and_unknown_formats_refused(folder, tmp_path):
    """As macOS and Jupyter leave them behind."""
    for path in ("images/._a.jpg", "images/.ipynb_checkpoints/a-checkpoint.png"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "images/readme.txt").write_text("not an image")
    assert len(label_folder(folder).images) == 2
    (tmp_path / "images/c.heic").write_bytes(b"x")
    with pytest.raises(InputError, match=r"c\.heic is an image of a format that is not read"):
        label_folder(folder)


def test_label_maps_of_sixteen_bits_are_numbers(folder, tmp_path):
    Image.fromarray(np.array([[0, 1], [2, 255]], np.uint16)).save(tmp_path / "labels/a.png")
    np.testing.assert_array_equal(label_folder(folder).labels[0], [[-1, 0], [1, -1]])


def test_a_byte_order_mark_is_no_part_of_a_name_and_case_no_difference(folder, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes(b"\xef\xbb\xbfsky\r\nRed Panda\r\ngrass")
    data = label_folder(folder)
    assert data.classes == ("sky", "Red Panda", "grass") and data.seen == (True, False, True)
    path.write_text("sky\nred panda\nSky ")
    with pytest.raises(
        InputError, match=r"has the class 'Sky' twice, ignoring case: classes 1 and 3"
    ):
        label_folder(folder)


def test_palette_maps_give_indices_not_colours(folder, tmp_path):
    path = tmp_path / "labels/a.png"
    image = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8))
    image = image.convert("P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    image.save(path)
    np.testing.assert_array_equal(label_folder(folder).labels[0], [[-1, 0], [1, -1]])


def test_mistakes_of_a_label_folder_are_named(folder, tmp_path):
    for changes, message in (
        ({"images": str(tmp_path / "none")}, "is not a folder of images"),
        (
            {"images": str(tmp_path / "labels/deep"), "labels": "none"},
            "no label map, for one there is no none",
        ),
        ({"classes": str(tmp_path / "none.txt")}, "cannot read the class list"),
        ({"ignored": [255]}, r"b.png holds the values 9; with 3 classes from 1 the last is 3"),
        ({"first_label": 0}, r"b.png holds the values 3;"),
    ):
        with pytest.raises(InputError, match=message):
            label_folder(changed(folder, **changes))
    with pytest.raises(InputError, match=r"classes\.txt: unseen classes"):
        label_folder(changed(folder, unseen=["moon"]))
    with pytest.raises(ConfigError, match="first_label must be at least 0"):
        changed(folder, first_label=-1)


def test_files_that_do_not_fit_are_named(folder, tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nsky\n")
    with pytest.raises(InputError, match=r"has the class 'sky' twice"):
        label_folder(folder)
    (tmp_path / "classes.txt").write_text("sky\nred panda\ngrass\n")
    label = tmp_path / "labels/a.png"
    Image.new("L", (3, 2), 1).save(label)
    with pytest.raises(
        InputError, match=r"a.jpg is 2 x 2, its label map .*a.png 2 x 3 \(height x width\)"
    ):
        label_folder(folder)
    Image.new("RGB", (2, 2)).save(label)
    with pytest.raises(
        InputError, match=r"a.png holds colours \(RGB\), expected one class index per pixel"
    ):
        label_folder(folder)
    label.write_bytes(label.read_bytes()[:40])
    with pytest.raises(InputError, match=r"cannot read .*a.png"):
        label_folder(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no images"):
        label_folder(changed(folder, images=str(empty)))


def test_eight_bits_are_too_few_for_hundreds_of_classes(folder, tmp_path):
    (tmp_path / "classes.txt").write_text("".join(f"class {n}\n" for n in range(300)))
    folder = changed(folder, unseen=[])
    with pytest.raises(InputError, match="8 bits per pixel, but this set has more classes"):
        label_folder(folder)
    for name in ("a", "deep/b"):
        values_hw = np.array([[300, 1], [256, 0]], np.uint16)
        Image.fromarray(values_hw).save(tmp_path / f"labels/{name}.png")
    assert label_folder(folder).labels[0].tolist() == [[299, 0], [255, -1]]


def test_synonyms_of_a_class_list_share_its_label(folder, tmp_path):
    (tmp_path / "classes.txt").write_text("sky;heaven\nred panda; sky\ngrass\n")
    opened = open_label_folder(folder)
    assert opened.class_names == ("sky", "red panda", "grass")
    names = ("sky", "heaven", "red panda", "grass")
    assert opened.class_list.query_names() == (names, (0, 0, 1, 2))
