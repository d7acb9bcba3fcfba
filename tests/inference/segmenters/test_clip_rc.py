"""CLIP-RC as a segmenter: what it answers, its penalty, prototypes, and files that are damaged."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES
from ovref_inference import ReferenceCollection, load_segmenter
from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.errors import ModelError
from ovref_inference.models import resolve
from ovref_inference.segmenters import ClipRcConfig, WindowConfig
from ovref_inference.segmenters.clip_rc import read_head
from scene_collections import EMBED, collection_url, publish_scenes

__all__ = ["collection_url"]
WHOLE = ClipRcConfig(windows=None, seen_penalty=0.0)
IMAGE = render(1, "test").image_hwc


def config_of(folder, **changes):
    return replace(WHOLE, weights=str(folder), **changes)


@pytest.fixture(scope="module")
def trained_head():
    """The miniature's."""
    return Path(resolve("miniature:clip_rc"))


@pytest.fixture(scope="module")
def segmenter(trained_head):
    return load_segmenter(trained_head, "clip_rc", config=WHOLE, device="cpu")


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """References of the same CLIP's dense features."""
    folder = tmp_path_factory.mktemp("clip_collection")
    clip = VisualEncoderConfig(model="miniature:clip", library="open_clip", size_hw=(64, 64))
    url = str(folder / "collection")
    publish_scenes(40, folder / "scratch", url, replace(EMBED, visual=clip))
    with ReferenceCollection.open(url) as opened:
        yield opened


def test_it_answers_any_classes_at_the_size_of_each_image(segmenter):
    images = [IMAGE, np.ascontiguousarray(IMAGE[:40, :50])]
    names = ["sky", "car", "something never heard of"]
    found = segmenter.segment(images, names)
    for one, image in zip(found, images, strict=True):
        assert one.labels_hw.shape == image.shape[:2] and one.missing == ()
        scores = one.scores_chw
        assert scores.shape == (3, *image.shape[:2]) and (scores > 0).all() and (scores < 1).all()
        np.testing.assert_array_equal(one.labels_hw, scores.argmax(0))
        np.testing.assert_allclose(one.max_score_hw, scores.max(0))


def test_scores_are_the_enlarged_logits_of_the_network(segmenter):
    names = ["sky", "car"]
    (found,) = segmenter.segment([IMAGE], names)
    pixels = segmenter._pixels([IMAGE], (64, 64))
    classes = torch.from_numpy(segmenter.texts(names))
    with torch.no_grad():
        logits = segmenter._network(pixels, classes).logits_nchw
    large = torch.nn.functional.interpolate(logits, size=(64, 64), mode="bilinear")
    np.testing.assert_allclose(found.scores_chw, large[0].sigmoid(), atol=1e-6)


def test_classes_that_it_was_trained_on_score_lower(trained_head, segmenter):
    names = ["Sky ", "car", "sky"]
    lower = load_segmenter(
        trained_head, "clip_rc", config=replace(WHOLE, seen_penalty=0.25), device="cpu"
    )
    plain, found = (one.segment([IMAGE], names)[0].scores_chw for one in (segmenter, lower))
    np.testing.assert_allclose(plain - found, np.full_like(plain, 0.25) * [[[1]], [[0]], [[1]]],
                               atol=1e-6)  # fmt: skip


def test_windows_are_those_of_the_head(trained_head):
    loaded = load_segmenter(str(trained_head), "clip_rc", device="cpu")
    assert loaded.config.windows == WindowConfig(short_side=64, crop=64, stride=53)
    assert loaded.config.seen_penalty == 0.1
    wide = np.tile(IMAGE, (1, 2, 1))
    (found,) = loaded.segment([wide], ["sky", "grass"])
    assert found.labels_hw.shape == (64, 128)


def test_prototypes_take_the_place_of_names(trained_head, collection):
    config = config_of(trained_head, classes="prototypes")
    loaded = load_segmenter(collection, "clip_rc", config=config, device="cpu")
    names = [*CLASSES[:3], "zzzz"]
    with pytest.warns(UserWarning, match="no references for zzzz"):
        embeddings, missing = loaded.prepare(names)
    assert missing == ("zzzz",) and not embeddings[3].any()
    own = collection.prototypes(names[:1]).vectors_nkd[0].sum(0)
    np.testing.assert_allclose(embeddings[0], own / np.linalg.norm(own), atol=1e-6)
    (found,) = loaded.segment([IMAGE], names)
    assert found.missing == ("zzzz",) and not (found.labels_hw == 3).any()
    assert (found.scores_chw[3] == -np.inf).all() and np.isfinite(found.scores_chw[:3]).all()
    by_name = load_segmenter(trained_head, "clip_rc", config=WHOLE, device="cpu")
    assert not np.allclose(by_name.segment([IMAGE], names)[0].scores_chw[0], found.scores_chw[0])


def test_collections_that_do_not_fit_are_refused(trained_head, collection, collection_url):
    config = config_of(trained_head, classes="prototypes")
    with (
        ReferenceCollection.open(collection_url) as other,
        pytest.raises(ValueError, match="prototypes must be of miniature:clip's features"),
    ):
        load_segmenter(other, "clip_rc", config=config, device="cpu")
    with pytest.raises(ValueError, match=r"clip_rc needs config\.weights"):
        load_segmenter(collection, "clip_rc", device="cpu")


@pytest.mark.parametrize("names", [[], ["sky", " "], "sky"])
def test_names_must_be_names(segmenter, names):
    with pytest.raises(ValueError, match="names must be a list"):
        segmenter.segment([IMAGE], names)


@pytest.fixture
def copied(trained_head, tmp_path):
    """A head that a test may damage."""
    for name in ("clip_rc.json", "clip_rc.safetensors"):
        shutil.copy(trained_head / name, tmp_path)
    return tmp_path


def changed(folder, **changes):
    path = folder / "clip_rc.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_or_damaged_head_is_told(copied, tmp_path):
    with pytest.raises(ModelError, match=r"cannot read clip_rc\.json and clip_rc\.safetensors"):
        read_head(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match="needs its trained weights"):
        read_head("")
    changed(copied, format_version=2)
    with pytest.raises(ModelError, match="has format version 2, this ovref reads 1"):
        read_head(str(copied))
    changed(copied, format_version=1, unheard=3)
    with pytest.raises(ModelError, match=r"clip_rc\.json is damaged: .*unheard"):
        read_head(str(copied))
    (copied / "clip_rc.json").write_text("[]")
    with pytest.raises(ModelError, match=r"clip_rc\.json is damaged"):
        read_head(str(copied))


def test_weights_of_another_file_or_architecture_are_refused(copied):
    path = copied / "clip_rc.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ModelError, match=r"not the file that clip_rc\.json belongs to"):
        read_head(str(copied))
    path.write_bytes(whole)
    tree = json.loads((copied / "clip_rc.json").read_text())
    changed(copied, network=tree["network"] | {"prompts": 5})
    with pytest.raises(ModelError, match=r"1 parameters differ, the first is encoder\.prompts_lkw"):
        load_segmenter(copied, "clip_rc", config=WHOLE, device="cpu")
    changed(copied, network=tree["network"], dim=512)
    with pytest.raises(ModelError, match="trained for a CLIP of 512 dimensions"):
        load_segmenter(copied, "clip_rc", config=WHOLE, device="cpu")


@pytest.mark.parametrize(("penalty", "fits"), [(0.0, True), (1.0, True), (-0.1, False)])
def test_penalties(penalty, fits):
    if fits:
        assert ClipRcConfig(seen_penalty=penalty).seen_penalty == penalty
    else:
        with pytest.raises(ValueError, match="seen_penalty must be in"):
            ClipRcConfig(seen_penalty=penalty)
