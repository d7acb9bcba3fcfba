"""Nearest patches: every part against a slow rule, and an evaluation end to end."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse import csr_array
from torch.nn.functional import interpolate

from ovref.config import dump, parse
from ovref.errors import InputError, MismatchError, StorageError
from ovref.evaluation import knn
from ovref.evaluation.compare import open_run
from ovref.evaluation.evaluate import EvaluateSpec, evaluate
from ovref.evaluation.knn import (
    MemoryBank,
    NearestPatches,
    make_memory_bank,
    patch_class_shares,
    sample_patches,
    upsampled_labels,
)
from ovref.evaluation.named_sets.label_folder import LabelFolder
from ovref.evaluation.spec import KnnConfig


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.mark.parametrize(
    ("size_hw", "grid_hw"), [((12, 8), (3, 2)), ((7, 11), (3, 4)), ((3, 3), (5, 2))]
)
def test_a_patch_has_the_shares_of_its_labelled_pixels(rng, size_hw, grid_hw):
    label_hw = rng.integers(-1, 4, size_hw)
    found = patch_class_shares(label_hw, grid_hw, 4)
    expected = np.zeros((grid_hw[0] * grid_hw[1], 4))
    for y in range(size_hw[0]):
        for x in range(size_hw[1]):
            patch = int((y + 0.5) / size_hw[0] * grid_hw[0]) * grid_hw[1]
            patch += int((x + 0.5) / size_hw[1] * grid_hw[1])
            if label_hw[y, x] >= 0:
                expected[patch, label_hw[y, x]] += 1
    sums = expected.sum(1, keepdims=True)
    np.testing.assert_allclose(found, expected / np.where(sums > 0, sums, 1), rtol=1e-6)


def test_patches_of_rare_classes_are_chosen_first(rng):
    shares_pc = np.zeros((100, 3), np.float32)
    shares_pc[:90, 0] = 1  # a common class, a rare one, and patches without any label
    shares_pc[90:95, 1] = 1
    chosen = [sample_patches(shares_pc, 10, rng) for _ in range(200)]
    assert all(len(set(one.tolist())) == 10 and one.max() < 95 for one in chosen)
    rare = np.mean([(one >= 90).sum() for one in chosen])
    assert rare > 2  # at random it would be 10 * 5 / 95, half of one
    np.testing.assert_array_equal(sample_patches(shares_pc, 1000, rng), np.arange(95))


def attended(query, keys, values, beta, k):
    """The paper's cross-attention of one query, in the words of open-hummingbird-eval: softmax of
    the dot products of normalised vectors, divided by beta, over the k nearest keys."""
    query = query / np.linalg.norm(query)
    products = keys @ query
    nearest = np.argsort(-products)[:k]
    weights = np.exp(products[nearest] / beta)
    return (weights / weights.sum()) @ values[nearest]


@pytest.mark.parametrize("neighbours", [1, 5, 100])
def test_scores_are_the_paper_s_attention(rng, neighbours, monkeypatch):
    monkeypatch.setattr(knn, "BLOCK", 7)
    keys = rng.normal(size=(40, 6))
    keys = (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float16)
    values = rng.dirichlet([0.3] * 5, size=40).astype(np.float32)
    memory = MemoryBank(features_nd=keys, shares_nc=csr_array(values))
    config = KnnConfig(neighbours=neighbours, temperature=0.1)
    queries = rng.normal(size=(9, 6)).astype(np.float32)
    found = NearestPatches(memory, config, "cpu")(queries)
    expected = [attended(q, keys.astype(float), values, 0.1, neighbours) for q in queries]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_best_class_of_a_pixel_is_that_of_interpolated_scores(rng):
    scores_pc = rng.dirichlet([0.2] * 6, size=12).astype(np.float32)
    scores_pc[:, 2] = 0
    labels_hw, best_hw = upsampled_labels(scores_pc, (3, 4), (17, 9))
    whole = torch.from_numpy(scores_pc.T.reshape(1, 6, 3, 4).copy())
    large_chw = interpolate(whole, size=(17, 9), mode="bilinear")[0].numpy()
    np.testing.assert_array_equal(labels_hw, large_chw.argmax(0))
    np.testing.assert_array_equal(best_hw, large_chw.max(0))


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    output = tmp_path_factory.mktemp("knn") / "out"
    return EvaluateSpec(
        method="knn", output=str(output), scenes=4, pictures=1, shard_size=2,
        knn=KnnConfig(images=40, memory=2000),
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(spec):
    return evaluate(spec, lambda line: None, device="cpu")


def test_a_backbone_is_judged_without_a_collection(spec, result):
    (row,) = result["rows"]
    assert row["name"] == "nearest patches" and row["miou"] > 0.3 and row["pixel_accuracy"] > 0.7
    assert 0 < row["pq"] < 1 and result["support"] == {} and result["ratios"] == {}
    assert result["collection"]["references"] == 40 * 50
    by_class = {one["class"]: one["references"] for one in result["per_class"]}
    assert by_class["sky"] > 100
    run = open_run(spec.output)
    assert run.result["details_of"] == "nearest patches"
    assert "2000 patches of training images" in Path(run.folder, "evaluation.md").read_text()
    assert parse(EvaluateSpec, json.loads(json.dumps(dump(spec)))) == spec


def test_what_is_remembered_is_not_encoded_again(spec, result, monkeypatch):
    monkeypatch.setattr(knn, "patch_class_shares", None)
    again = evaluate(spec, lambda line: None, device="cpu")
    assert again["rows"] == result["rows"]


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.5}, {"images": 39}, {"seed": 1}, {"memory": 1000}]
)
def test_other_settings_need_another_output(spec, result, changes):
    with pytest.raises(MismatchError):
        evaluate(replace(spec, knn=replace(spec.knn, **changes)), lambda line: None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"collection": "x"}, "has no collection"),
        ({"method": "collection"}, "name the collection"),
        ({"protocol": "tcl"}, "leave out protocol"),
        ({"folder": LabelFolder(images="a", labels="b", classes="c")}, "needs knn.folder"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluateSpec(**{"method": "knn", "output": "x", **settings})


def test_training_images_of_other_classes_are_refused(tmp_path):
    folders = []
    for name, classes in (("judged", "sky\ntree\n"), ("training", "tree\nsky\n")):
        for part in ("images", "labels"):
            (tmp_path / name / part).mkdir(parents=True)
            pixels = np.zeros((8, 8, 3) if part == "images" else (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / part / "a.png")
        (tmp_path / name / "classes.txt").write_text(classes)
        places = {part: str(tmp_path / name / part) for part in ("images", "labels")}
        folders.append(LabelFolder(**places, classes=str(tmp_path / name / "classes.txt")))
    spec = EvaluateSpec(
        method="knn", output=str(tmp_path / "out"), folder=folders[0],
        knn=KnnConfig(folder=folders[1]),
    )  # fmt: skip
    with pytest.raises(InputError, match="have other classes"):
        evaluate(spec, lambda line: None)


def test_a_damaged_memory_and_images_without_labels_are_errors(tmp_path):
    spec = EvaluateSpec(method="knn", output=str(tmp_path), scenes=1)
    training = spec.open_training(spec.open_data())
    blank = replace(
        training,
        ids=training.ids[:1],
        read=lambda name: replace(training.read(name), label_hw=np.full((64, 64), -1)),
    )
    encode = lambda images: np.ones((len(images), 2, 2, 3), np.float32)  # noqa: E731
    models = SimpleNamespace(
        encoder=lambda config: SimpleNamespace(encode=encode), clear=lambda: None
    )
    with pytest.raises(InputError, match="labelled pixel"):
        make_memory_bank(spec, blank, models)
    (tmp_path / knn.MEMORY).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(StorageError, match="damaged"):
        make_memory_bank(spec, blank, models)
