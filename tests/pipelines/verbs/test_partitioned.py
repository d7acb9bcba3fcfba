"""Verbs on a partitioned collection, compared with the undivided one of the same references."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from array_fakes import EMBED, FakeTexts
from hub_server import Hub
from ovref.errors import InputError
from ovref.exchange import exports, publishing
from ovref.exchange.class_lists import read_classes
from ovref.exchange.coverage import coverage
from ovref.exchange.own_arrays import OwnArrays, collection_from_arrays
from ovref.exchange.picture_files import Picture
from ovref_inference import ReferenceCollection
from ovref_inference.collection import format as fmt
from ovref_inference.collection import store
from ovref_pipelines.explore.library import Library
from ovref_pipelines.verbs import regenerate, search, tombstone
from ovref_pipelines.verbs.status import place_json, place_text
from ovref_pipelines.verbs.verify import verify
from partitioned import divide

NOUNS = ["cat", "dog", "elk", "fox"]
GROUPS = [["cat", "elk"], ["dog", "fox"]]
FIRST = fmt.PARTITION_IDS


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The undivided collection and the partitioned one."""
    folder = tmp_path_factory.mktemp("partitioned")
    rng = np.random.default_rng(0)
    nouns = NOUNS * 15
    centres = dict(zip(NOUNS, rng.standard_normal((4, 8)), strict=True))
    visual = np.stack([centres[noun] for noun in nouns]) + 0.3 * rng.standard_normal((60, 8))
    more = {
        "key": [f"image{i // 4:02d}#{i % 4}" for i in range(60)], "source": ["daam", "box"] * 30,
        "score": rng.random(60).tolist(),
    }  # fmt: skip
    captions = [f"{noun} number {i}" for i, noun in enumerate(nouns)]
    arrays = OwnArrays(visual=visual, nouns=nouns, captions=captions, more=more)
    collection_from_arrays(str(folder / "whole"), arrays, EMBED, texts=FakeTexts())
    divide(folder / "whole", GROUPS, folder / "divided", folder / "scratch")
    return str(folder / "whole"), str(folder / "divided")


@pytest.fixture
def both(places):
    with ReferenceCollection.open(places[0]) as a, ReferenceCollection.open(places[1]) as b:
        for one in (a, b):
            one._text_encoder = FakeTexts()
        yield a, b


@pytest.fixture
def changed(places, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(places[1], tmp_path / "changed")
    return str(tmp_path / "changed")


def keys(rows):
    return [row["key"] for row in rows]


def test_status_and_verify(changed):
    store.tombstone(changed, [FIRST + 1], "blurred")
    text = place_text(changed)
    assert "partitions: 2, of at most 30 references" in text and "index SQfp16" in text
    assert "most frequent nouns: elk (15), dog (15), cat (15), fox (14)" in text
    counts = json.loads(place_json(changed))["counts"]
    assert counts["references"] == 60 and counts["nouns"] == 4 and counts["tombstones"] == 1
    assert verify(changed) == []
    path = Path(changed, "partitions", "00001", "visual.f16.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (problem,) = verify(changed)
    assert "partitions/00001/visual.f16.npy does not have the checksum" in problem


def test_deletions(changed):
    chosen = tombstone.wanted(changed, ids=[FIRST + 3], keys=["image00"], nouns=["elk"])
    assert len(chosen) == 15 + 3 + 1 and min(chosen) == 0 and FIRST + 3 in chosen
    with pytest.raises(InputError, match=rf"has no references \[{FIRST - 1}\]"):
        tombstone.wanted(changed, ids=[FIRST - 1])
    assert "would be deleted: 15 elk, 2 fox" in tombstone.delete(changed, chosen, "x", dry_run=True)
    tombstone.delete(changed, chosen, "not so\ngood")
    listed = json.loads(tombstone.listed_json(changed))
    assert sorted(one["id"] for one in listed) == chosen
    assert "19 because of: not so good" in tombstone.listed(changed)
    back = tombstone.wanted(changed, ids=None, nouns=["elk"], deleted=True)
    assert len(back) == 15 and "15 deletions undone" in tombstone.undo(changed, back)
    with ReferenceCollection.open(changed) as collection:
        assert len(collection) == 56
        with pytest.raises(InputError, match="or they are deleted"):
            regenerate.row_of(collection, FIRST + 3)
        assert regenerate.row_of(collection, FIRST + 4)["id"] == FIRST + 4


def test_search_coverage_and_exports(both, tmp_path):
    for words in ("elk", "a dog"):
        found = [search.search(one, search.Query(text=words), 7) for one in both]
        assert keys(found[0].rows) == keys(found[1].rows) and found[0].scores == found[1].scores
    classes = read_classes("cat,dog;fox,elk,qwerty")
    rows = [coverage(one, classes) for one in both]
    for a, b in zip(*rows, strict=True):
        assert (a.name, a.verdict, a.noun, a.references) == (
            b.name,
            b.verdict,
            b.noun,
            b.references,
        )
        assert a.contrast == pytest.approx(b.contrast, abs=1e-6)
        assert a.tightness == pytest.approx(b.tightness, abs=1e-3)
    for number, one in enumerate(both):
        exports.export_prototypes(one, tmp_path / f"{number}")
    vectors = [np.load(tmp_path / f"{number}" / "prototypes.npy") for number in range(2)]
    np.testing.assert_allclose(*vectors, atol=2e-3)
    assert (tmp_path / "1" / "nouns.txt").read_text().split() == NOUNS


def test_an_evaluation_knows_of_deletions(changed):
    with ReferenceCollection.open(changed) as collection:
        before = collection.deletions
    store.tombstone(changed, [FIRST], "x")
    with ReferenceCollection.open(changed) as collection:
        assert collection.deletions != before
    store.untombstone(changed, [FIRST])
    with ReferenceCollection.open(changed) as collection:
        assert collection.deletions == before


def test_the_explorer_shows_what_it_shows_of_the_undivided_collection(places, changed):
    a, b = Library(places[0]), Library(changed)
    assert a.nouns("", "count", 0, 9) == b.nouns("", "count", 0, 9)
    of_noun = [one.noun("dog", "suspicious", 0, 30) for one in (a, b)]
    assert keys(of_noun[0]["references"]) == keys(of_noun[1]["references"])
    assert of_noun[0]["neighbours"] == of_noun[1]["neighbours"]
    number = of_noun[1]["references"][0]["id"]
    assert number >= FIRST
    shown, expected = b.reference(number), a.reference(of_noun[0]["references"][0]["id"])
    assert shown["row"]["id"] == number and shown["row"]["key"] == expected["row"]["key"]
    assert keys(shown["neighbours"]) == keys(expected["neighbours"])
    # Of an image's references those in the same partition.
    assert [one["noun"] for one in shown["image"]] == ["dog", "fox"]
    assert len(a.prototypes("fox")) == len(b.prototypes("fox"))
    for bad in (FIRST - 1, 2 * FIRST, -1, 10**30):
        with pytest.raises(InputError, match="no reference"):
            b.reference(bad)
    store.tombstone(changed, [number], "wrong")
    b.reopen()
    assert b.about()["counts"]["tombstones"] == 1
    assert b.reference(number)["row"]["id"] == number


def test_publish(places, changed, tmp_path):
    target = tmp_path / "there"
    first = publishing.publish(places[1], str(target), title="Animals")
    card = (target / "README.md").read_text()
    assert "60 references of 4 nouns" in card and "cat (15), dog (15)" in card
    listed = sums(target)
    assert first["files"] == len(listed) + 1 and verify(str(target)) == []
    assert sum(name.startswith("partitions/") for name in listed) == 18
    stamp = {path: path.stat().st_mtime_ns for path in target.rglob("*.npy")}
    assert publishing.publish(places[1], str(target), title="Animals") == first
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*.npy")} == stamp
    with ReferenceCollection.open(changed) as collection:
        gone = collection.references_of("fox")[:5]
        vector = collection.visual[gone[0]]
        kept = [key for key in collection.to_table(["key"]).column("key").to_pylist()
                if key not in keys(collection.rows(gone))]  # fmt: skip
    store.tombstone(changed, gone.tolist(), "opt-out")
    publishing.publish(changed, str(target), title="Animals")
    for path in target.rglob("*"):
        if path in stamp and "00000" in str(path):
            assert path.stat().st_mtime_ns == stamp[path]
        assert path.is_dir() or vector.tobytes() not in path.read_bytes()
    sums(target)
    with ReferenceCollection.open(target, verify="full") as collection:
        assert collection.to_table(["key"]).column("key").to_pylist() == kept
        assert collection.manifest.counts["references"] == 55
    with pytest.raises(Exception, match="holds another collection"):
        publishing.publish(places[1], str(target), title="Animals", int8=True)
    publishing.publish(places[1], str(target), title="Animals", int8=True, replace=True)
    with ReferenceCollection.open(target) as collection:
        assert collection.manifest.embeddings == "int8" and len(collection) == 60
    publishing.publish(places[0], str(target), title="Animals", replace=True)
    assert not (target / "partitions" / "00000" / "collection.json").exists()
    with ReferenceCollection.open(changed) as collection:
        rest = [*collection.references_of("fox"), *collection.references_of("dog")]
    store.tombstone(changed, [int(i) for i in rest], "opt-out")
    with pytest.raises(InputError, match=r"all references of the partition .*00001 are deleted"):
        publishing.publish(changed, str(tmp_path / "none"), title="x")


def pictures(rows):
    """Each image is 12 x 10; a reference's mask is one of four vertical bars."""
    found = []
    for row in rows:
        mask_hw = np.zeros((10, 12), dtype=bool)
        bar = int(row["key"][-1])
        mask_hw[1:9, 3 * bar : 3 * bar + 3] = True
        found.append(Picture(image_hwc=np.full((10, 12, 3), 40 * bar, np.uint8), mask_hw=mask_hw))
    return found


def test_banks_are_those_of_the_undivided_collection(both, tmp_path):
    for number, one in enumerate(both):
        exports.export_segrag(one, tmp_path / f"segrag{number}")
        exports.export_corrclip(one, pictures, tmp_path / f"corrclip{number}", name="bank")
    for noun in NOUNS:
        banks = [torch.load(tmp_path / f"segrag{n}/{noun}/prototypes.pt", weights_only=True)
                 for n in range(2)]  # fmt: skip
        np.testing.assert_allclose(*banks, atol=1e-6)
    heads, vectors = [], []
    for folder in (tmp_path / "corrclip0", tmp_path / "corrclip1"):
        heads.append((folder / "manifests/bank.images.tsv").read_text())
        bank = [
            torch.load(folder / f"{kind}.pt", weights_only=True).numpy()
            for kind in ("vfm_embeddings/bank_dinov2", "clip_embeddings/bank_metaclip_l")
        ]
        # Of four references of an image those of a partition come together.
        both_kinds = np.concatenate(bank, axis=1).reshape(15, 4, -1)
        vectors.append([sorted(map(tuple, of_image)) for of_image in both_kinds.tolist()])
    assert heads[0] == heads[1] and vectors[0] == vectors[1]


@pytest.mark.parametrize("coco", [False, True])
def test_exemplars_are_those_of_the_undivided_collection(both, tmp_path, coco):
    trees = []
    for number, one in enumerate(both):
        folder = tmp_path / f"{number}"
        exports.export_exemplars(one, pictures, folder, k=3, coco=coco)
        if coco:
            trees.append([json.loads((folder / name).read_text())
                          for name in ("coco.json", "references.json")])  # fmt: skip
            continue
        tree = json.loads((folder / "exemplars.json").read_text())
        for exemplar in (exemplar for of_noun in tree.values() for exemplar in of_noun):
            (row,) = one.rows([exemplar.pop("reference")])
            exemplar["key"] = row["key"]
        trees.append(tree)
    assert trees[0] == trees[1]


def places_elsewhere(kind, request, monkeypatch):
    """Where to publish: on a real S3 server on the loopback, or on the stand-in for the Hub."""
    if kind == "s3":
        request.getfixturevalue("s3_environment")
        return "s3://bucket/animals"
    server = Hub()
    request.addfinalizer(server.close)
    for name, value in (
        ("HF_ENDPOINT", server.url), ("HF_TOKEN", "hf_test"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return "hf://me/animals"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own
@pytest.mark.parametrize("kind", ["s3", "hub"])
def test_published_elsewhere_it_answers_alike_and_deletions_follow(
    both, changed, tmp_path, kind, request, monkeypatch
):
    target = places_elsewhere(kind, request, monkeypatch)
    publishing.publish(changed, target, title="Animals")
    texts, regions = both[1].noun_embeddings, np.asarray(both[1].visual)[:9]
    with ReferenceCollection.open(target, cache=tmp_path / "cache", verify="full") as opened:
        for found, expected in (
            (opened.search_text(texts, 9), both[1].search_text(texts, 9)),
            (opened.search_regions(regions, 20), both[1].search_regions(regions, 20)),
        ):
            np.testing.assert_array_equal(found.ids, expected.ids)
        assert opened.to_table(["key"]) == both[1].to_table(["key"])
    gone = [1, FIRST + 2]
    if kind == "s3":
        assert verify(target) == []
        store.tombstone(target, gone, "opt-out")
        store.untombstone(target, gone[:1])
        with ReferenceCollection.open(target, cache=tmp_path / "cache") as opened:
            assert opened.has(gone).all() and len(opened) == 59
            assert not np.isin(opened.search_text(texts, 60).ids, gone[1:]).any()
    store.tombstone(changed, gone, "opt-out")
    publishing.publish(changed, target, title="Animals", replace=True)
    with ReferenceCollection.open(target, cache=tmp_path / "cache", verify="full") as opened:
        assert opened.manifest.counts["references"] == len(opened) == 58


def sums(target):
    """The files of SHA256SUMS, after checking that they are those that are there."""
    import hashlib

    lines = [line.split("  ") for line in (target / "SHA256SUMS").read_text().splitlines()]
    for digest, name in lines:
        assert hashlib.sha256((target / name).read_bytes()).hexdigest() == digest
    files = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    named = {name for _, name in lines}
    assert named | {"SHA256SUMS"} == files
    return named
