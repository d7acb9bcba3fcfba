"""Labelled sets as corpora: labels, masks and identities of scenes in published layouts."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from labelled_scenes import write_ade, write_coco
from ovref.contract import Dropped
from ovref.corpora import CorpusSpec, identify
from ovref.corpora.spec import LabelSpec
from ovref.errors import InputError
from ovref.labelled_corpora import identify_corpus, read_corpus
from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES, THINGS
from ovref.storage.codec import decode, encode
from ovref.stored_images import decode_image

SEEDS = range(4)


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    root = tmp_path_factory.mktemp("ade")
    return root, write_ade(root, SEEDS)


def spec_of(ade, **labels):
    root, names = ade
    return CorpusSpec(
        path=str(root), labels=LabelSpec(dataset="ade150", names=str(names), **labels)
    )


def segments_of(record):
    """Nouns of each segment with its mask."""
    with Image.open(io.BytesIO(record.segments.map_png)) as image:
        numbers_hw = np.asarray(image)
    assert numbers_hw.max() <= len(record.segments.nouns)
    return [
        ([record.labels[noun].text for noun in nouns], numbers_hw == number)
        for number, nouns in enumerate(record.segments.nouns, start=1)
    ]


def test_classes_of_a_label_map_are_nouns_with_their_masks(ade):
    records = list(read_corpus(spec_of(ade), images=True))
    assert len(records) == len(SEEDS)
    for seed, record in zip(SEEDS, records, strict=True):
        label_hw = render(seed, "train").label_hw
        present = [CLASSES[label] for label in np.unique(label_hw[1:])]
        assert record.text == ", ".join(present)
        assert [noun.text for noun in record.labels] == present
        found = segments_of(record)
        assert [names for names, _ in found] == [[name] for name in present]
        for (name,), mask_hw in found:
            expected_hw = label_hw == CLASSES.index(name)
            expected_hw[0] = False  # no class there
            np.testing.assert_array_equal(mask_hw, expected_hw)
        assert decode_image(record.image).shape[:2] == label_hw.shape
        assert decode(record.key, encode(record)) == record


def test_all_names_of_a_class_are_nouns_of_its_masks(ade):
    records = list(read_corpus(spec_of(ade, synonyms=True), images=True))
    owners = [names for record in records for names, _ in segments_of(record)]
    assert ["sky", "sky seen"] in owners and ["sand"] in owners


def test_without_images_there_are_no_masks(ade):
    record = next(read_corpus(spec_of(ade)))
    assert record.image is None and record.segments is None and record.labels


def test_things_of_coco_are_segments_one_by_one(tmp_path):
    path, images = write_coco(tmp_path, SEEDS)
    spec = CorpusSpec(path=str(path), images=str(images), labels=LabelSpec())
    counts = 0
    for record in read_corpus(spec, images=True):
        if isinstance(record, Dropped):
            assert record.reason == "no_labels"
            continue
        seed = int(record.source.rpartition(":")[2].removesuffix(".jpg"))
        scene = render(seed, "train")
        for (name,), mask_hw in segments_of(record):
            assert name in THINGS
            (instance,) = set(scene.instance_hw[mask_hw].tolist())
            np.testing.assert_array_equal(mask_hw, scene.instance_hw == instance)
            counts += 1
    assert counts == sum(render(seed, "train").instance_hw.max() for seed in SEEDS)


def test_an_image_without_labels_is_dropped(tmp_path):
    names = write_ade(tmp_path, SEEDS)
    blank = np.zeros((64, 64), np.uint8)
    Image.fromarray(blank).save(tmp_path / "annotations/training/ADE_train_00000001.png")
    records = list(read_corpus(spec_of((tmp_path, names)), images=True))
    assert [one.reason for one in records if isinstance(one, Dropped)] == ["no_labels"]
    assert len(records) == len(SEEDS)


def test_a_rotated_photograph_keeps_its_file(tmp_path):
    names = write_ade(tmp_path, [0])
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "images/training/ADE_train_00000000.jpg"
    Image.fromarray(np.zeros((40, 64, 3), np.uint8)).save(path, exif=exif)
    Image.fromarray(np.full((64, 40), 3, np.uint8)).save(
        tmp_path / "annotations/training/ADE_train_00000000.png"
    )
    (record,) = read_corpus(spec_of((tmp_path, names)), images=True)
    assert record.image == path.read_bytes()
    (found,) = segments_of(record)
    assert found[0] == [CLASSES[2]] and found[1].shape == (64, 40) and found[1].all()


def test_the_identity_follows_what_is_read(tmp_path):
    names = write_ade(tmp_path, SEEDS)
    spec = spec_of((tmp_path, names))
    before = identify_corpus(spec)
    (tmp_path / "elsewhere.txt").write_text("not of the set")
    assert identify_corpus(spec) == before
    assert identify_corpus(spec_of((tmp_path, names), synonyms=True)) != before
    names.write_text(names.read_text().replace("sky", "heaven", 1))
    renamed = identify_corpus(spec)
    assert renamed != before
    path = tmp_path / "annotations/training/ADE_train_00000001.png"
    path.write_bytes(path.read_bytes() + b"more")
    assert identify_corpus(spec) != renamed


def test_a_corpus_of_captions_is_what_it_was(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\na dog\n")
    spec = CorpusSpec(path=str(tmp_path / "a.txt"))
    assert identify_corpus(spec) == identify(spec)
    assert [one.text for one in read_corpus(spec)] == ["a cat", "a dog"]


def test_a_limit_counts_usable_images(ade):
    root, names = ade
    spec = CorpusSpec(path=str(root), limit=2, labels=LabelSpec(dataset="ade150", names=str(names)))
    assert len(list(read_corpus(spec))) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "s3://bucket/ade", "labels": LabelSpec(dataset="ade150")}, "local disk"),
        ({"path": "nowhere", "labels": LabelSpec(dataset="ade151")}, "no data set 'ade151'"),
        ({"path": "nowhere", "labels": LabelSpec(dataset="ade150")}, "does not contain ade150"),
    ],
)
def test_a_set_that_is_not_there_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        next(read_corpus(CorpusSpec(**settings)))


def test_coco_annotations_need_their_images(tmp_path):
    path, _ = write_coco(tmp_path, [0])
    with pytest.raises(InputError, match="set `images`"):
        next(read_corpus(CorpusSpec(path=str(path), labels=LabelSpec())))
    path.write_text(json.dumps({"annotations": []}))
    spec = CorpusSpec(path=str(path), images=str(tmp_path), labels=LabelSpec())
    with pytest.raises(InputError, match="cannot read the COCO annotations"):
        next(read_corpus(spec))
