"""The sorted vocabulary, against a list of Python's."""

import pickle

import numpy as np
import pyarrow as pa
import pytest

from ovref_inference.collection.words import Words, are_sorted, find_in, repeated


@pytest.fixture(params=[0, 1, 10_000])
def texts(request):
    """Distinct words of one to four bytes a letter, sorted as Python does."""
    rng = np.random.default_rng(0)
    letters = list("ab zé\u07ff\u0800漢\uffee\U00010000🦊")
    words = {"".join(rng.choice(letters, rng.integers(0, 9))) for _ in range(request.param)}
    return sorted(words)


def test_it_reads_like_a_list(texts):
    words = Words(pa.array(texts, pa.string()))
    assert words == texts and texts == words and words != [*texts, "x"] and words != tuple(texts)
    assert len(words) == len(texts) and list(words) == texts and words[:] == texts
    assert words[3:-2:7] == texts[3:-2:7] and words[::-1] == texts[::-1]
    assert [words[at] for at in range(-len(texts), len(texts))] == texts * 2
    for at in (len(texts), -len(texts) - 1):
        with pytest.raises(IndexError):
            words[at]
    assert "\n".join(words) == "\n".join(texts)
    np.testing.assert_array_equal(np.array(words), np.array(texts))
    assert are_sorted(words.array) and not repeated(words.array)


def test_it_can_be_sent_to_another_process(texts):
    words = pickle.loads(pickle.dumps(Words(pa.array(texts, pa.string()))))
    assert words == texts and [words.index(word) for word in texts] == list(range(len(texts)))


def test_words_with_a_null_are_not_sorted():
    assert not are_sorted(pa.array(["a", None, "b"])) and not are_sorted(pa.array([None, "b"]))


def test_it_finds_words(texts):
    words = Words(pa.array(texts, pa.string()))
    assert [words.index(word) for word in texts] == list(range(len(texts)))
    others = ["qq", "\ud800", "a\x00", "🦊" * 9, "é" * 30]
    for word in [*others, None, 3]:
        assert word not in words and words.find(word) is None
        with pytest.raises(ValueError, match="is not in the list"):
            words.index(word)
    found = words.rows_of(pa.array([*texts[::-3], *others[2:]], pa.string()))
    assert found.tolist() == [*range(len(texts))][::-3] + [-1] * 3


def test_a_part_of_an_array():
    words = Words(pa.array(["a", "b", "bé", "c", "d"])[1:4])
    assert words == ["b", "bé", "c"] and words.find("bé") == 1 and "a" not in words
    assert words == Words(pa.array(["b", "bé", "c"])) and words != Words(pa.array(["b"]))
    assert repr(words) == "Words(3: 'b', 'bé', 'c')"
    assert words.index("c", 1) == 2
    with pytest.raises(ValueError, match="'c' is not in the list"):
        words.index("c", 0, 2)


def test_order_and_repetitions():
    assert not are_sorted(pa.array(["b", "a"])) and not are_sorted(pa.array(["a", "a"]))
    assert repeated(pa.array(["a", "a", "a", "b", "c", "c"])) == ["a", "c"]


def test_finding_in_any_sequence():
    for words in (["a", "c"], Words(pa.array(["a", "c"]))):
        assert [find_in(words, word) for word in ("a", "b", "c", "d")] == [0, None, 1, None]
