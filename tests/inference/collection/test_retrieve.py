"""Textual retrieval embeddings, vectors and model ids."""

import numpy as np
import pytest

from ovref_inference import ModelError
from ovref_inference.collection.retrieve import TEMPLATES, class_embeddings, retrieval_embedding
from ovref_inference.models import resolve
from ovref_inference.vectors import l2_normalised


class Letters:
    """Counts letters: a text encoder with nothing to learn; its vectors are not normalised."""

    def encode(self, texts):
        return np.array([[text.count(c) + 1.0 for c in "abcdefgh"] for text in texts])


def test_class_embeddings_average_normalised_templates():
    found = class_embeddings(Letters(), ["bed", "cab"])
    for row, name in enumerate(["bed", "cab"]):
        each = [Letters().encode([t.replace("{}", name)])[0] for t in TEMPLATES]
        mean = np.mean([v / np.linalg.norm(v) for v in each], axis=0)
        np.testing.assert_allclose(found[row], mean / np.linalg.norm(mean), atol=1e-6)
    assert len(TEMPLATES) == 7 and all(t.count("{}") == 1 for t in TEMPLATES)


def test_braces_in_a_name_are_only_letters():
    assert class_embeddings(Letters(), ["{0} {x}"]).shape == (1, 8)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], TEMPLATES, "names"),
        (["a", " "], TEMPLATES, "names"),
        (["a"], (), "template"),
        (["a"], ("no place",), "no place"),
        (["a"], ("{} {}",), "exactly one"),
    ],
)
def test_bad_names_and_templates_are_refused(names, templates, message):
    with pytest.raises(ValueError, match=message):
        class_embeddings(Letters(), names, templates)


def test_retrieval_embedding_weighs_directions_not_lengths():
    noun, caption = np.array([[3.0, 0.0]]), np.array([[0.0, 500.0]])
    found = retrieval_embedding(noun, caption)
    np.testing.assert_allclose(found, l2_normalised(np.array([[0.9, 0.1]])), atol=1e-6)
    np.testing.assert_allclose(retrieval_embedding(noun, caption, (1.0, 0.0)), [[1.0, 0.0]])
    np.testing.assert_allclose(retrieval_embedding(noun, caption, (0.0, 2.0)), [[0.0, 1.0]])


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-0.1, 1.0)])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        retrieval_embedding(np.ones((1, 2)), np.ones((1, 2)), weights)


def test_normalising_extremes():
    vectors = np.array([[1e-30, 0.0], [1e30, 1e30], [3.0, 4.0]])
    expected = [[1.0, 0.0], [0.5**0.5, 0.5**0.5], [0.6, 0.8]]
    np.testing.assert_allclose(l2_normalised(vectors), expected, rtol=1e-6)
    assert l2_normalised(np.zeros((0, 4))).shape == (0, 4)
    halves = np.full((2, 3), 60000.0, dtype=np.float16)
    np.testing.assert_allclose(np.linalg.norm(l2_normalised(halves), axis=1), 1.0, rtol=1e-6)


def test_bad_vectors_are_placed():
    vectors = np.ones((2, 3, 4))
    vectors[1, 2] = 0
    with pytest.raises(ValueError, match=r"1 of 6 .* first at \[1, 2\]"):
        l2_normalised(vectors)


def test_model_ids():
    assert resolve("facebook/dinov2-large") == "facebook/dinov2-large"
    assert resolve("./some/folder") == "./some/folder"
    assert resolve("miniature:dinov2").endswith("dinov2")


@pytest.mark.parametrize("name", ["", "nothing", "../scenes.py", ".", ".."])
def test_unknown_miniature_names_are_refused(name):
    with pytest.raises(ModelError, match="no miniature model"):
        resolve(f"miniature:{name}")


def test_a_missing_miniature_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install ./pipelines/ovref_miniature"):
        resolve("miniature:clip")
