"""Coverage of class lists, against a loop over every reference and every pair of prototypes."""

import numpy as np
import pytest

from array_fakes import EMBED, FakeTexts
from ovref.exchange.class_lists import read_classes
from ovref.exchange.coverage import SAMPLE, coverage, nearest_sets
from ovref.exchange.own_arrays import OwnArrays, collection_from_arrays
from ovref.exchange.picture_files import Picture
from ovref.reduce.spec import ReduceSpec
from ovref_inference import ReferenceCollection
from ovref_inference.collection.prototypes import PrototypeConfig
from ovref_inference.vectors import l2_normalised

COUNTS = {"cat": 30, "dog": 25, "hound": 12, "lion": 3, "tree": 40, "bush": 20}
NEAR = {"puppy": "dog", "shrub": "bush", "lion": "cat"}
"""Words whose texts are near a noun's."""
CLASSES = "cat,Dog;hound;puppy,lion,tree,shrub,xylophone"


class NearTexts(FakeTexts):
    def encode(self, texts):
        plain = list(texts)
        for word, noun in NEAR.items():
            plain = [text.replace(word, noun) for text in plain]
        return l2_normalised(super().encode(plain) + 0.1 * super().encode(texts))


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    rng = np.random.default_rng(0)
    centres = {noun: rng.standard_normal(16) for noun in COUNTS}
    centres["bush"] = centres["tree"]  # which can be told apart by nothing
    nouns = [noun for noun, count in COUNTS.items() for _ in range(count)]
    visual = np.stack([centres[noun] + 0.5 * rng.standard_normal(16) for noun in nouns])
    folder = tmp_path_factory.mktemp("coverage") / "collection"
    spec = ReduceSpec(prototypes=PrototypeConfig(k=4, min_references=8))
    arrays = OwnArrays(visual=visual, nouns=nouns)
    collection_from_arrays(str(folder), arrays, EMBED, texts=NearTexts(), spec=spec)
    with ReferenceCollection.open(folder) as opened:
        opened._text_encoder = NearTexts()
        yield opened


def test_what_stands_for_each_class_the_weakest_first(collection):
    rows = coverage(collection, read_classes(CLASSES))
    counted = [
        (row.name, row.verdict, row.noun, row.by_name, row.by_synonym, row.by_neighbours)
        for row in rows
    ]
    assert counted == [
        ("xylophone", "none", rows[0].noun, 0, 0, 0),
        ("shrub", "borrowed", "bush", 0, 0, 20),
        ("lion", "few", "lion", 3, 0, 0),
        ("cat", "own", "cat", 30, 0, 0),  # before Dog, for it can be confused, as tree can
        ("tree", "own", "tree", 40, 0, 0),
        ("Dog", "own", "dog", 25, 12, 0),
    ]
    assert [row.confusable for row in rows] == [False, True, True, True, True, False]
    by_name = {row.name: row for row in rows}
    assert by_name["lion"].others == ("cat",) and by_name["lion"].nearest == "cat"
    assert by_name["cat"].nearest == "lion"  # whose prototypes are made of its references
    assert (by_name["tree"].nearest, by_name["shrub"].nearest) == ("shrub", "tree")
    none = by_name["xylophone"]
    assert none.tightness is none.nearest is none.similarity is None


def test_cosines_are_those_of_a_loop(collection):
    listed = {"cat": ["cat"], "Dog": ["Dog", "hound", "puppy"], "lion": ["lion"],
              "tree": ["tree"], "shrub": ["shrub"]}  # fmt: skip
    stands = {"Dog": ["dog", "hound"], "shrub": ["bush"]}

    def prototypes_of(name):
        found = [collection.prototypes([word]) for word in listed[name]]
        return [vector for one in found for vector in one.vectors_nkd[0, : one.counts[0]]]

    for row in coverage(collection, read_classes(CLASSES)):
        if row.name == "xylophone":
            continue
        own, cosines = prototypes_of(row.name), []
        for noun in stands.get(row.name, [row.name]):
            for number in collection.references_of(noun):
                vector = collection.visual[number].astype(np.float64)
                vector /= np.linalg.norm(vector)
                cosines.append(max(float(vector @ prototype) for prototype in own))
        assert row.tightness == pytest.approx(np.mean(cosines), abs=1e-4)
        others = {
            other: max(float(a @ b) for a in own for b in prototypes_of(other))
            for other in listed
            if other != row.name
        }
        taken, odd = [], []
        own_nouns = stands.get(row.name, [row.name])
        ids = [number for noun in own_nouns for number in collection.references_of(noun)]
        vectors = l2_normalised(collection.visual[sorted(ids)])
        for number, vector in enumerate(vectors):
            best = {name: max(float(vector @ p) for p in prototypes_of(name)) for name in listed}
            nearest = max(best, key=best.get)
            if best[nearest] > best[row.name] + 1e-6:
                taken.append(nearest)
            rest = np.delete(vectors, number, 0).sum(0)
            odd.append(float(vector @ rest / np.linalg.norm(rest)))
        assert row.taken_share == pytest.approx(len(taken) / len(vectors))
        assert row.taken_for == (max(set(taken), key=taken.count) if taken else None)
        away = np.median(odd) - np.array(odd)
        far = away > 3 * 1.4826 * np.median(np.abs(away))
        assert row.outliers == pytest.approx(far.mean() if len(odd) > 4 else 0)
        assert row.nearest == max(others, key=others.get)
        assert row.similarity == pytest.approx(others[row.nearest], abs=1e-4)


def test_without_prototypes_the_counts_are_the_same(collection):
    classes = read_classes(CLASSES)
    measured = {row.name: row for row in coverage(collection, classes)}
    for row in coverage(collection, classes, measured=False):
        full = measured[row.name]
        assert (row.verdict, row.noun, row.references) == (full.verdict, full.noun, full.references)
        assert row.cosine == pytest.approx(full.cosine, abs=1e-6)
        assert row.tightness is row.nearest is None and row.others == ()


def test_heat_is_the_mean_score_of_references_with_heatmaps(tmp_path):
    arrays = OwnArrays(
        visual=np.random.default_rng(1).standard_normal((5, 8)),
        nouns=["cat", "cat", "cat", "dog", "dog"],
        more={"score": [1.0, 2.0, 9.0, 0.5, 0.5], "source": ["daam", "daam", "sam", "sam", "sam"]},
    )
    collection_from_arrays(str(tmp_path / "c"), arrays, EMBED, texts=FakeTexts())
    with ReferenceCollection.open(tmp_path / "c") as opened:
        rows = {row.name: row for row in coverage(opened, read_classes("cat,dog"))}
    assert rows["cat"].contrast == 1.5 and rows["dog"].contrast is None


def test_clip_is_asked_about_the_boxes_of_references_whose_images_are_there(
    collection, monkeypatch
):
    classes = read_classes("cat,dog;hound,tree")
    texts_nd = NearTexts().encode([f"a {name}." for name in classes.query_names])

    class Eyes(NearTexts):
        def encode_images(self, images):  # what a crop shows is said by its only pixel's red
            assert all(image_hwc.shape == (1, 1, 3) for image_hwc in images)
            return texts_nd[[int(image_hwc[0, 0, 0]) for image_hwc in images]]

    def pictures(rows):
        for row in rows:
            if row["noun"] == "tree":
                continue  # whose images are gone
            image_hwc, mask_hw = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), bool)
            mask_hw[1, 2] = True
            shows = {"cat": "dog" if row["id"] < 15 else "cat"}.get(row["noun"], row["noun"])
            image_hwc[1, 2, 0] = classes.query_names.index(shows)
            yield row, Picture(image_hwc=image_hwc, mask_hw=mask_hw)

    monkeypatch.setattr(collection, "_text_encoder", Eyes())
    rows = {row.name: row.clip for row in coverage(collection, classes, pictures=pictures)}
    assert rows["tree"] is None
    assert rows["dog"].first == 1 and rows["dog"].cosine == pytest.approx(1, abs=1e-3)
    asked = [i for i in collection.references_of("cat").tolist()[::2]]  # of 30, at most 24
    assert rows["cat"].references == len(asked)
    assert rows["cat"].first == pytest.approx(sum(i >= 15 for i in asked) / len(asked))


def test_a_single_class_has_no_nearest(collection):
    (row,) = coverage(collection, read_classes("cat"))
    assert row.nearest is row.similarity is None and row.tightness > 0.8 and not row.confusable


def test_the_nearest_of_many_sets_are_those_of_every_pair():
    rng = np.random.default_rng(3)
    sets = [l2_normalised(rng.standard_normal((size, 8))) for size in rng.integers(0, 9, 200)]
    nearest, similarity = nearest_sets(sets)
    assert sum(map(len, sets)) > 512
    for at, own in enumerate(sets):
        pairs = [(float((own @ other.T).max()), number) for number, other in enumerate(sets)
                 if number != at and len(own) and len(other)]  # fmt: skip
        assert nearest[at] == (max(pairs)[1] if pairs else -1)
        assert similarity[at] == pytest.approx(max(pairs)[0] if pairs else 0.0, abs=1e-6)


def test_no_more_than_a_sample_is_read(collection, monkeypatch):
    monkeypatch.setattr("ovref.exchange.coverage.SAMPLE", 10)
    rows = {row.name: row for row in coverage(collection, read_classes("tree,cat"))}
    ids = collection.references_of("tree")[::4]
    found = collection.prototypes(["tree"])
    cosines = l2_normalised(collection.visual[ids]) @ found.vectors_nkd[0, : found.counts[0]].T
    assert rows["tree"].tightness == pytest.approx(float(cosines.max(1).mean()), abs=1e-5)
    assert SAMPLE == 1000
