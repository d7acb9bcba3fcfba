"""Support: own, borrowed from a near noun, or none; relative to the collection and its texts."""

from types import SimpleNamespace

import numpy as np
import pytest

from ovref.miniature.shapes import CLASSES
from ovref_inference.collection.class_support import MEANINGLESS, class_support, relative_cosine
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.collection.retrieve import class_embeddings
from ovref_inference.encoders.config import TextEncoderConfig
from ovref_inference.encoders.load import load_text_encoder
from ovref_inference.vectors import l2_normalised

STRANGE = ["MRI scanner", "Katze", "pipette"]


def vocabulary(nouns, embeddings, counts=None):
    return SimpleNamespace(
        nouns=nouns,
        noun_embeddings=l2_normalised(embeddings),
        noun_counts=np.array(counts or [1] * len(nouns)),
    )


def at(noun, cosine):
    """A unit vector at this cosine to the one-hot vector of a noun, off the plane of the others."""
    vector = np.zeros(5, np.float32)
    vector[noun], vector[4] = cosine, np.sqrt(1 - cosine**2)
    return vector


def test_own_borrowed_and_none():
    world = vocabulary(["boat", "cat", "dog"], np.eye(3, 5), [3, 0, 2])
    texts = np.stack([at(0, 0.2), at(2, 0.9), at(2, 0.3), at(1, 1.0)])
    found = class_support(world, [" Boat", "puppy", "gravel", "cat"], texts)
    assert [str(one) for one in found] == [
        "own references",
        "borrowed from dog at cosine 0.90",
        "none (nearest: dog at cosine 0.30)",
        "none (nearest: boat at cosine 0.00)",  # the noun has no references left
    ]
    everything = class_support(world, ["puppy", "gravel"], texts[1:3], floor=None)
    assert [one.source for one in everything] == ["borrowed"] * 2


def test_the_floor_is_on_the_scale_of_the_vocabulary():
    """Another text tower adds a direction that all texts share: its cosines are higher, the answer
    is the same."""
    nouns = l2_normalised(np.eye(4, 5))
    texts = np.stack([at(0, 0.6), at(0, 0.4)])
    for shared in (0.0, 1.0, 3.0):
        tower = [
            l2_normalised(np.c_[v, np.full(len(v), shared, np.float32)]) for v in (nouns, texts)
        ]
        cosines = (tower[1] @ tower[0].T).max(1)
        np.testing.assert_allclose(relative_cosine(cosines, tower[0]), [0.6, 0.4], atol=1e-5)
        found = class_support(vocabulary(list("abcd"), tower[0]), ["x", "y"], tower[1])
        assert [one.source for one in found] == ["borrowed", "none"]


def test_a_class_among_meaningless_words_borrows_nothing():
    world, text = vocabulary(["boat", "cat"], np.eye(2, 5)), at(0, 0.9)[None]
    asked = []

    def words(cosine):
        asked.append(cosine)
        return np.stack([at(1, 0.1), cosine * text[0] + np.sqrt(1 - cosine**2) * at(1, 1.0)])

    near, far = (
        class_support(world, ["x"], text, meaningless=lambda c=c: words(c)) for c in (0.85, 0.7)
    )
    assert near[0].source == "none" and far[0].source == "borrowed"
    class_support(world, ["Cat"], text, meaningless=lambda: words(0.0))
    assert asked == [0.85, 0.7]  # not where every class has references of its own


def test_no_references_one_noun_and_foreign_texts():
    world = vocabulary(["boat"], np.eye(1, 5), [0])
    assert [str(one) for one in class_support(world, ["x", "boat"], np.eye(2, 5))] == ["none"] * 2
    alone = vocabulary(["boat"], np.eye(1, 5))
    found = class_support(alone, ["x", "y"], np.stack([at(0, 0.5), at(0, 0.4)]))
    assert [one.source for one in found] == ["borrowed", "none"]
    with pytest.raises(ValueError, match=r"width 5 .* found 3"):
        class_support(alone, ["x"], np.eye(1, 3))


def test_large_vocabularies_are_sampled():
    rng = np.random.default_rng(0)
    vectors = l2_normalised(rng.normal(size=(4001, 8)) + 1)
    whole = vectors[::3]
    middle = np.median((whole @ whole.T)[np.triu_indices(len(whole), 1)])
    np.testing.assert_allclose(relative_cosine(np.float32([middle, 1]), vectors), [0, 1], atol=1e-5)


@pytest.fixture(scope="module")
def clip():
    return load_text_encoder(TextEncoderConfig(model="miniature:clip"), device="cpu")


def test_strange_classes_are_missing_from_the_miniature(clip, collection_url):
    """Its text tower puts every word that it does not know beside the moon and the fish."""
    with ReferenceCollection.open(collection_url) as collection:
        prototypes = collection.prototypes([*STRANGE, "sky"])
    assert prototypes.counts[:3].tolist() == [0, 0, 0] and prototypes.counts[3] > 0
    assert prototypes.nouns[:3] == ((),) * 3 and not prototypes.vectors_nkd[:3].any()
    assert [one.source for one in prototypes.support] == ["none"] * 3 + ["own"]


def test_classes_of_the_miniature_stand_for_their_other_names_but_not_for_each_other(clip):
    texts = class_embeddings(clip, CLASSES)
    words = ("brick walls", "trees", "old brick wall", "a house", "snowmen", "yellow flower")
    nouns = ("brick wall", "tree", "brick wall", "house", "snowman", "flower")
    strange = class_embeddings(clip, MEANINGLESS)
    found = class_support(
        vocabulary(list(CLASSES), texts),
        words,
        class_embeddings(clip, words),
        meaningless=lambda: strange,
    )
    assert [(one.source, one.nouns) for one in found] == [("borrowed", (n,)) for n in nouns]
    for row, name in enumerate(CLASSES):
        rest = [c for c in CLASSES if c != name]
        world = vocabulary(rest, np.delete(texts, row, 0))
        (held_out,) = class_support(world, [name], texts[[row]], meaningless=lambda: strange)
        assert held_out.source == "none", (name, held_out)
