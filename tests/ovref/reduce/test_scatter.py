"""The counts of a vocabulary and its plan, against what is held as a whole."""

import tracemalloc
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from ovref.errors import StorageError
from ovref.reduce import partition_tree, scatter
from ovref.reduce.partition_tree import divide, read_tree
from ovref.storage.file_store import Store
from ovref.storage.shards import TableFile
from ovref.storage.steps import open_step
from ovref_inference.vectors import l2_normalised


@pytest.fixture
def steps(tmp_path):
    store = Store.open(str(tmp_path))
    return [open_step(store, name, {}) for name in ("counts", "nouns", "plan")]


def commit(step, name, table):
    with TableFile(table.schema) as file:
        file.write(table)
        step.publish(name, file, inputs=len(table))


def encoded(step, nouns, vectors, *, each):
    for start in range(0, len(nouns), each):
        some = pa.array(nouns[start : start + each])
        found = vectors[start : start + each]
        scatter.encode_nouns(step, f"{start:06d}", some, lambda _, found=found: found)


def drawn(nouns, dim=12, seed=0):
    rng = np.random.default_rng(seed)
    vectors = l2_normalised(rng.standard_normal((nouns, dim))).astype(np.float32)
    names = [f"noun {number:04d}" for number in range(nouns)]
    return names, vectors, rng.integers(1, 40, nouns)


@pytest.mark.parametrize("added_up", [3, 10_000])
def test_counts_are_added_up_in_the_order_of_python_s_texts(steps, monkeypatch, added_up):
    monkeypatch.setattr(scatter, "_ADDED_UP", added_up)
    rng, expected = np.random.default_rng(0), Counter()
    texts = ["z", "Z", "ä", "\uffee", "\U0001f600", "zz", "", "a b"]
    for number in range(7):
        some = {texts[at]: int(rng.integers(1, 9)) for at in rng.permutation(len(texts))[:4]}
        expected.update(some)
        table = pa.table([list(some), list(some.values())], schema=scatter.COUNTED)
        commit(steps[0], f"{number:06d}", table)
    found = scatter.total_counts(steps[0])
    assert found.schema == scatter.COUNTED
    assert found.column("noun").to_pylist() == sorted(expected)
    assert found.column("count").to_pylist() == [expected[noun] for noun in sorted(expected)]


def test_the_vocabulary_says_which_nouns_are_known():
    totals = pa.table([["a", "b", "c"], [1, 2, 3]], schema=scatter.COUNTED)
    known = pa.table({"noun": ["x", "c", "a"], "leaf": pa.array([7, 5, 0], pa.int32())})
    assert scatter.vocabulary(totals, known).column("leaf").to_pylist() == [0, None, 5]
    assert scatter.vocabulary(totals, None).column("leaf").to_pylist() == [None] * 3


@pytest.mark.parametrize("grown", [False, True])
def test_a_plan_is_that_of_embeddings_held_as_a_whole(steps, monkeypatch, grown):
    nouns, vectors, counts = drawn(300)
    _, others, other_counts = drawn(200, seed=1)
    base, _ = divide(others, other_counts, 700)
    is_known = np.random.default_rng(2).random(300) < (0.4 if grown else 0)
    monkeypatch.setattr(partition_tree, "_ROWS", 64)
    if grown:
        leaf_of = np.array([base.leaf_of(vector) for vector in vectors])
        leaf_of[is_known] = (leaf_of[is_known] + 1) % base.leaves  # wherever its tree had sent it
        tree = base
    else:
        tree, leaf_of = divide(vectors, counts, 1000)
    new = [noun for noun, known in zip(nouns, is_known, strict=True) if not known]
    encoded(steps[1], new, vectors[~is_known], each=70)
    totals = pa.table([nouns, counts], schema=scatter.COUNTED)
    known = pa.table({"noun": nouns, "leaf": pa.array(leaf_of, pa.int32())})
    found = scatter.vocabulary(totals, known.filter(pa.array(is_known)))
    scatter.make_plan(steps[2], found, steps[1], 1000, base if grown else None)
    with steps[2].file(scatter.PLAN, "npz") as path:
        saved = read_tree(path, "the plan")
    np.testing.assert_array_equal(saved.directions, tree.directions)
    for leaf in range(tree.leaves):
        here = np.flatnonzero(leaf_of == leaf)
        part = scatter.read_part(steps[2], scatter.PLAN, leaf)
        first = [row for row in here if not is_known[row]]
        rows = first + [row for row in here if is_known[row]]
        assert part.column("noun").to_pylist() == [nouns[row] for row in rows]
        assert part.column("count").to_pylist() == counts[rows].tolist()
        planned = scatter.planned_embeddings(steps[2], leaf)
        assert list(planned) == [nouns[row] for row in first]
        for row in first:
            np.testing.assert_array_equal(planned[nouns[row]], vectors[row])


def test_a_plan_holds_a_part_of_the_embeddings(steps, monkeypatch):
    """The vocabulary is ten times what is allocated at once."""
    monkeypatch.setattr(partition_tree, "_ROWS", 256)
    nouns, vectors, counts = drawn(8000, dim=256)
    encoded(steps[1], nouns, vectors, each=500)
    found = scatter.vocabulary(pa.table([nouns, counts], schema=scatter.COUNTED), None)
    whole, most = vectors.nbytes, int(counts.sum()) // 30
    del vectors, nouns
    tracemalloc.start()
    try:
        scatter.make_plan(steps[2], found, steps[1], most, None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < whole / 2


def test_a_plan_of_deletions_alone_has_no_nouns(steps):
    base, _ = divide(*drawn(50)[1:], 100)
    found = scatter.vocabulary(scatter.total_counts(steps[0]), None)
    scatter.make_plan(steps[2], found, steps[1], 100, base)
    assert scatter.planned_sizes(steps[2], base.leaves).tolist() == [0] * base.leaves


def test_embeddings_of_other_nouns_are_refused(steps):
    nouns, vectors, counts = drawn(20)
    encoded(steps[1], nouns[:15], vectors[:15], each=10)
    found = scatter.vocabulary(pa.table([nouns, counts], schema=scatter.COUNTED), None)
    with pytest.raises(StorageError, match="embeddings of 15 nouns, expected 20"):
        scatter.make_plan(steps[2], found, steps[1], 100, None)
