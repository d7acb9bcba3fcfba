"""Labelled batches: what is varied, what is the same on any workers, and what is never shown."""

import colorsys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovref.class_files import ClassList
from ovref.errors import InputError
from ovref.evaluation.metrics_panoptic import TruePanoptic
from ovref.evaluation.named_sets.label_folder import LabelFolder
from ovref.evaluation.named_sets.opening import Example, LabelledSet
from ovref.miniature.shapes import CLASSES
from ovref.training.labelled_batches import LabelledBatches, TrainingData, distorted
from ovref.training.losses import HIDDEN, UNLABELLED

NAMES = ("sky", "sea", "boat", "car")
PLAIN = TrainingData(scenes=1, short_side=8, scale=(1.0, 1.0), flip=0.0, colour=False)


def labelled_set(maps):
    """Label maps; the images show the labels in red, and the number of the image in green."""

    def read(name):
        label_hw = maps[int(name)]
        image_hwc = np.zeros((*label_hw.shape, 3), np.uint8)
        image_hwc[..., 0], image_hwc[..., 1] = label_hw + 10, int(name)
        return Example(id=name, image_path=Path(name), image_hwc=image_hwc, label_hw=label_hw)

    classes = ClassList(name="four", source="", classes=tuple((name,) for name in NAMES))
    ids = tuple(map(str, range(len(maps))))
    return LabelledSet(name="maps", class_list=classes, convention="test", ids=ids, read=read)


def random_maps(count, size_hw=(8, 8), low=-1):
    rng = np.random.default_rng(3)
    return [rng.integers(low, 4, size_hw).astype(np.int32) for _ in range(count)]


def batches(
    maps, config=PLAIN, classes=(0, 1, 2, 3), shown=(0, 1, 2, 3), size_hw=(8, 8), **options
):
    settings = {"batch": 4, "seed": 0} | options
    return LabelledBatches(
        labelled_set(maps), classes, config, shown=shown, size_hw=size_hw, **settings
    )


def joined(parts):
    arrays = [np.concatenate([getattr(p, n) for p in parts]) for n in ("images_nhwc", "labels_nhw")]
    return [name for part in parts for name in part.names], *arrays


def equal(one, other):
    return one[0] == other[0] and all(
        np.array_equal(a, b) for a, b in zip(one[1:], other[1:], strict=True)
    )


def test_unvaried_images_are_what_the_set_has():
    made = batches(random_maps(3))
    batch = made(0, 0, 1)
    assert batch.images_nhwc.shape == (4, 8, 8, 3) and batch.images_nhwc.dtype == np.uint8
    assert batch.labels_nhw.dtype == np.int64
    for name, image, labels in zip(batch.names, batch.images_nhwc, batch.labels_nhw, strict=True):
        assert (image[..., 1] == int(name)).all()
        np.testing.assert_array_equal(labels, image[..., 0].astype(int) - 10)


def test_every_image_comes_once_an_epoch_in_an_order_of_its_own():
    made = batches(random_maps(8))
    epochs = [[n for step in (2 * e, 2 * e + 1) for n in made(step, 0, 1).names] for e in range(3)]
    assert all(sorted(names) == list("01234567") for names in epochs)
    assert len({tuple(names) for names in epochs}) == 3
    other = batches(random_maps(8), seed=1)
    assert other(0, 0, 1).names != made(0, 0, 1).names


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_together_are_the_whole(parts):
    config = replace(PLAIN, scale=(0.5, 2.0), flip=0.5, colour=True, threads=2)
    made = batches(random_maps(5, (12, 9)), config)
    for step in (0, 7):
        whole = joined([made(step, 0, 1)])
        assert equal(joined([made(step, part, parts) for part in range(parts)]), whole)
        assert equal(joined([batches(random_maps(5, (12, 9)), config)(step, 0, 1)]), whole)


def test_crops_are_scaled_flipped_and_padded_with_their_labels():
    config = replace(PLAIN, scale=(0.5, 2.0), flip=0.5)
    maps = [np.tile(np.arange(4, dtype=np.int32).repeat(3), (9, 1))] * 2
    made = batches(maps, config, size_hw=(8, 16), batch=32)
    batch = made(0, 0, 1)
    flipped = wide = padded = 0
    for image, labels in zip(batch.images_nhwc, batch.labels_nhw, strict=True):
        inside = labels != UNLABELLED
        # Bilinear images and nearest labels agree but at edges.
        off = np.abs(image[..., 0].astype(int) - 10 - labels)[inside]
        assert (off <= 1).all() and (off == 0).mean() > 0.6
        assert (image[~inside] == 0).all()
        row = labels[0][labels[0] >= 0]
        assert (np.diff(row) >= 0).all() or (np.diff(row) <= 0).all()
        flipped += row[0] > row[-1]
        padded += not inside.all()
        wide += (row == row[0]).sum() > 4 or len(row) == 16
    assert 4 < flipped < 28 and padded and wide


def test_of_several_crops_one_of_varied_classes_is_taken():
    label_hw = np.zeros((8, 64), np.int32)
    label_hw[:, 28:36] = 1  # half a crop wide, in the middle of one class
    made = batches([label_hw], replace(PLAIN, most_of_one=0.75), size_hw=(8, 16), batch=32)
    shares = [(labels == 0).mean() for labels in made(0, 0, 1).labels_nhw]
    assert np.mean([share < 0.75 for share in shares]) > 0.8
    made = batches([label_hw], replace(PLAIN, most_of_one=1.0), size_hw=(8, 16), batch=32)
    shares = [(labels == 0).mean() for labels in made(0, 0, 1).labels_nhw]
    assert np.mean([share < 0.75 for share in shares]) < 0.8


def test_masks_of_classes_that_are_not_shown_never_come():
    """Whatever unseen class a pixel has, the batches are the same."""
    maps = random_maps(6)
    others = [np.where(m == 3, 2, m).astype(np.int32) for m in maps]
    inductive = {"classes": (1, 0), "shown": (0, 1)}
    for step in range(3):
        one, other = (batches(m, **inductive)(step, 0, 1) for m in (maps, others))
        np.testing.assert_array_equal(one.labels_nhw, other.labels_nhw)
        assert set(np.unique(one.labels_nhw)) <= {0, 1, UNLABELLED, HIDDEN}
    names = batches(maps, **inductive)(0, 0, 1)
    truth = np.stack([maps[int(name)] for name in names.names])
    wanted = np.select([truth == 1, truth == 0, truth == -1], [0, 1, UNLABELLED], HIDDEN)
    np.testing.assert_array_equal(names.labels_nhw, wanted)
    # In a transductive training the network knows four classes, and sees masks of two.
    known = batches(maps, classes=(0, 1, 2, 3), shown=(0, 1))(0, 0, 1).labels_nhw
    np.testing.assert_array_equal(known, np.where(truth >= 2, HIDDEN, truth))


def test_an_image_without_a_shown_class_gives_way_to_the_next():
    maps = [np.full((8, 8), 3, np.int32), np.zeros((8, 8), np.int32)]
    made = batches(maps, classes=(0, 1), shown=(0, 1))
    assert {name for step in range(4) for name in made(step, 0, 1).names} == {"1"}
    with pytest.raises(InputError, match="has a pixel of a class that is trained"):
        batches(maps[:1], classes=(0, 1), shown=(0, 1))(0, 0, 1)


def panoptic_set(ids_hw, labels, crowd=()):
    data = labelled_set([np.vectorize(lambda one: labels.get(one, -1))(ids_hw).astype(np.int32)])
    found = TruePanoptic(ids_hw=ids_hw, labels=labels, crowd=frozenset(crowd))
    return replace(data, read=lambda name: replace(data.read(name), panoptic=found))


def test_instances_are_told_apart_and_crowds_are_none():
    """Segments of COCO have numbers of three bytes; a hidden class has none that is shown."""
    ids_hw = np.zeros((8, 8), np.int32)
    ids_hw[:2], ids_hw[2:4], ids_hw[4, :6], ids_hw[5], ids_hw[6] = 3_000_000, 7, 5, 9, 70_000
    data = panoptic_set(ids_hw, {3_000_000: 2, 7: 2, 5: 0, 9: 1, 70_000: 3, 11: 2}, crowd=[9])
    settings = {"shown": (0, 1, 2), "size_hw": (8, 8), "batch": 1, "seed": 0}
    one = LabelledBatches(data, (2, 1, 0), PLAIN, instances=True, **settings)(0, 0, 1)
    (segments,), (labels,) = one.segments_nhw, one.labels_nhw
    wanted = np.full((8, 8), UNLABELLED)
    wanted[:4], wanted[4, :6], wanted[6] = 0, 2, HIDDEN
    np.testing.assert_array_equal(labels, wanted)
    first, second, third = (set(segments[where].flat) for where in (np.s_[:2], np.s_[2:4],
                                                                   np.s_[4, :6]))  # fmt: skip
    assert len(first | second | third) == 3 and min(first | second | third) >= 0
    np.testing.assert_array_equal(segments < 0, labels < 0)
    np.testing.assert_array_equal(segments[labels < 0], labels[labels < 0])
    # Without instances, or without segments of its own, a set has a segment for each class.
    plain = LabelledBatches(data, (2, 1, 0), PLAIN, **settings)(0, 0, 1)
    np.testing.assert_array_equal(plain.segments_nhw, plain.labels_nhw)
    assert (plain.labels_nhw == 1).sum() == 8
    semantic = batches(random_maps(1), instances=True)(3, 0, 1)
    np.testing.assert_array_equal(semantic.segments_nhw, semantic.labels_nhw)
    assert one.first == 0 and semantic.first == 12


def test_an_image_of_one_hidden_segment_gives_way_to_the_next():
    hidden = panoptic_set(np.full((8, 8), 7, np.int32), {7: 3})
    other = panoptic_set(np.full((8, 8), 7, np.int32), {7: 1})
    data = replace(
        hidden, ids=("0", "1"), read=lambda name: (hidden, other)[int(name)].read("0")
    )
    settings = {"shown": (0, 1), "size_hw": (8, 8), "batch": 2, "seed": 0}
    batch = LabelledBatches(data, (0, 1), PLAIN, instances=True, **settings)(0, 0, 1)
    assert batch.names == ("1", "1") and (batch.labels_nhw == 1).all()


def test_segments_are_varied_as_their_image():
    rng = np.random.default_rng(5)
    ids_hw = rng.integers(0, 6, (12, 10)).astype(np.int32)
    labels = {number: number % 4 for number in range(1, 6)}
    config = replace(PLAIN, scale=(0.5, 2.0), flip=0.5)
    settings = {"shown": (0, 1, 2, 3), "size_hw": (8, 16), "batch": 16, "seed": 0}
    made = [
        LabelledBatches(panoptic_set(ids_hw, labels), (0, 1, 2, 3), config, instances=instances,
                        **settings)(0, 0, 1)
        for instances in (True, False)
    ]  # fmt: skip
    for one in made[1:]:
        np.testing.assert_array_equal(one.images_nhwc, made[0].images_nhwc)
        np.testing.assert_array_equal(one.labels_nhw, made[0].labels_nhw)
    numbers = made[0].segments_nhw  # numbered as their ids are ordered, of which 0 has none
    np.testing.assert_array_equal(np.where(numbers < 0, -1, numbers % 4), made[0].labels_nhw)


@pytest.mark.parametrize("value", [4, -2])
def test_labels_outside_of_the_class_list_are_refused(value):
    maps = random_maps(1)
    maps[0][2, 3] = value
    with pytest.raises(InputError, match=rf"0 of maps has labels from .*{value}.* -1 .* to 3"):
        batches(maps)(0, 0, 1)


def test_colours_are_varied_and_stay_colours():
    rng = np.random.default_rng(0)
    image_hwc = np.full((2, 2, 3), (200, 80, 40), np.uint8)
    found = np.stack([distorted(image_hwc, rng)[0, 0] for _ in range(400)]).astype(float)
    assert found.std(0).min() > 10
    hues = [colorsys.rgb_to_hsv(*pixel / 255)[0] for pixel in found]
    base = colorsys.rgb_to_hsv(200 / 255, 80 / 255, 40 / 255)[0]
    turns = np.abs((np.array(hues) - base + 0.5) % 1 - 0.5)
    assert 0.05 < turns.max() < 0.2
    assert image_hwc[0, 0].tolist() == [200, 80, 40]
    grey = distorted(np.full((1, 1, 3), 100, np.uint8), np.random.default_rng(2))
    assert np.ptp(grey.astype(int)) <= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of dataset with root, folder, and scenes"),
        ({"dataset": "voc_15_5"}, "give one of dataset with root"),
        ({"scenes": 3, "seen": ("car", "Cup"), "unseen": ("cup ",)}, r"found both of \['cup'\]"),
        ({"scenes": 3, "scale": (2.0, 1.0)}, "scale must be a range above 0"),
        ({"scenes": 3, "short_side": 0}, "short_side must be at least 1"),
        ({"scenes": 3, "long_side": 100}, "long_side must be at least 512"),
        ({"scenes": 3, "flip": 2.0}, "flip must be in"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingData(**settings)


def test_splits_of_scenes():
    data = TrainingData(scenes=5, unseen=("Car", "cup")).open()
    assert [n for n, s in zip(CLASSES, data.seen, strict=True) if not s] == ["car", "cup"]
    only = TrainingData(scenes=5, seen=("car", "cup")).open()
    assert [n for n, s in zip(CLASSES, only.seen, strict=True) if s] == ["car", "cup"]
    both = TrainingData(scenes=5, seen=("car",), unseen=("cup",)).open()
    assert sum(both.seen) == 1 and len(both) == 5
    assert TrainingData(scenes=5, limit=2).open().seen is None
    with pytest.raises(InputError, match=r"unseen classes \['dragon'\] are not among"):
        TrainingData(scenes=5, unseen=("dragon",)).open()


def test_sets_on_disk(tmp_path):
    for name in ("a", "b", "c"):
        for folder, mode in (("JPEGImages", "RGB"), ("SegmentationClassAug", "L")):
            path = tmp_path / folder / f"{name}.{'jpg' if mode == 'RGB' else 'png'}"
            path.parent.mkdir(exist_ok=True)
            Image.new(mode, (20, 10), 20 if mode == "L" else (1, 2, 3)).save(path)
    listed = tmp_path / "ImageSets/Segmentation"
    listed.mkdir(parents=True)
    (listed / "trainaug.txt").write_text("a\nc\n")
    data = TrainingData(dataset="voc_15_5", root=str(tmp_path)).open()
    assert data.name == "voc_15_5 train, 2 of 10582 images" and data.ids == ("a", "c")
    assert sum(data.seen) == 15 and not data.seen[19]
    assert np.unique(data.read("a").label_hw).tolist() == [19]
    asked = {"dataset": "voc_15_5", "root": str(tmp_path), "seen": data.class_names[18:]}
    with pytest.raises(InputError, match=r"found \['train', .*\] in data.seen, which the set's"):
        TrainingData(**asked).open()
    assert sum(TrainingData(**asked, unseen=data.class_names[:2]).open().seen) == 2
    (tmp_path / "names.txt").write_text("\n".join(f"class {n}" for n in range(21)))
    own = LabelFolder(
        images=str(tmp_path / "JPEGImages"), labels=str(tmp_path / "SegmentationClassAug"),
        classes=str(tmp_path / "names.txt"), unseen=("class 20",),
    )  # fmt: skip
    assert TrainingData(folder=own).open().seen[-1] is False
