"""Index choice, building, recall and reading, against exhaustive search in numpy."""

import hashlib
import re

import numpy as np
import pytest

from ovref_inference import CollectionError
from ovref_inference.collection import index as indexes
from ovref_inference.collection.exact import exact_search, faiss_module
from ovref_inference.collection.format import SearchPoint
from ovref_inference.vectors import l2_normalised


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((60, 24))
    noisy = centres[rng.integers(60, size=3000)] + 0.4 * rng.standard_normal((3000, 24))
    return l2_normalised(noisy).astype(np.float16)


def exact(vectors, queries, k):
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


@pytest.mark.parametrize(
    ("n", "factory"),
    [
        (1, "SQfp16"),
        (19_999, "SQfp16"),
        (20_000, "IVF512,SQfp16"),
        (100_000, "IVF1024,SQfp16"),
        (999_999, "IVF4096,SQfp16"),
        (1_000_000, "IVF4096,SQfp16"),
        (9_999_999, "IVF16384,SQfp16"),
        (10_000_000, "IVF65536_HNSW32,SQfp16"),
        (10**9, "IVF262144_HNSW32,SQfp16"),
    ],
)
def test_the_rule(n, factory):
    assert indexes.choose_index(n, 768) == factory
    lists = re.match(r"IVF(\d+)", factory)
    count, among = indexes.training_rows(n, factory)
    assert count <= among <= n
    # faiss' guidelines ask for 30 training vectors a list at least.
    assert lists is None or count >= 30 * int(lists[1])


def test_centroids_are_trained_on_rows_that_all_collections_with_as_many_lists_have():
    for first, last in ((20_000, 32_767), (524_289, 2_097_152)):
        factory = indexes.choose_index(first, 8)
        assert factory == indexes.choose_index(last, 8) != indexes.choose_index(last + 1, 8)
        assert indexes.training_rows(first, factory) == indexes.training_rows(last, factory)
    assert indexes.training_rows(500, "SQfp16") == (0, 0)


@pytest.mark.parametrize(("n", "dim"), [(0, 4), (4, 0)])
def test_nothing_to_index_is_refused(n, dim):
    with pytest.raises(ValueError, match="n >= 1"):
        indexes.choose_index(n, dim)


def test_flat_is_exact_search(vectors):
    queries = vectors[:20].astype(np.float32)
    index = indexes.build_index(vectors)
    scores, ids = indexes.search(index, queries, 7)
    expected_ids, expected = exact(vectors, queries, 7)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert indexes.tune(index, indexes.RecallQueries.of_rows(vectors)) == ()


def test_exact_search_in_chunks(vectors):
    queries = vectors[5:15].astype(np.float32)
    scores, ids = exact_search(vectors, queries, 9, rows=700)
    expected_ids, expected = exact(vectors, queries, 9)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    scores, ids = exact_search(vectors[:3], queries, 5)
    assert (ids[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all()


@pytest.mark.parametrize("factory", ["IVF64,SQfp16", "IVF64_HNSW8,SQfp16"])
def test_tuning_reaches_the_target_and_measures_what_it_says(vectors, factory):
    index = indexes.build_index(vectors, factory)
    questions = indexes.RecallQueries.of_rows(vectors, count=100, ks=(10, 150))
    points = indexes.tune(index, questions)
    assert [point.k for point in points] == [10, 150]
    rows = np.sort(np.random.default_rng(0).choice(len(vectors), 100, replace=False))
    queries = vectors[rows].astype(np.float32)
    for k, nprobe, recall, worst in ((p.k, p.nprobe, p.recall, p.worst_tenth) for p in points):
        assert recall >= 0.95
        measured = np.sort(questions.recalls(index, nprobe)[k])
        assert measured.mean() == pytest.approx(recall, abs=1e-4)
        assert measured[:10].mean() == pytest.approx(worst, abs=1e-4)
        # The same by hand: others that are among the true nearest others.
        _, ids = indexes.search(index, queries, k + 1, nprobe=nprobe)
        expected, _ = exact(vectors, queries, k + 1)
        overlap = [
            len((set(found) & set(true)) - {row}) / k
            for row, found, true in zip(rows, ids, expected, strict=True)
        ]
        assert abs(np.mean(overlap) - recall) < 0.03


def test_a_row_is_not_its_own_neighbour():
    # Two rows in each of 100 directions, each direction a list: one neighbour is there, not two.
    directions = np.eye(100, dtype=np.float32)
    rows = np.repeat(directions, 2, axis=0)
    rows[1::2] += 0.2 * np.roll(directions, 1, axis=1)
    rows = l2_normalised(rows).astype(np.float16)
    index = faiss_module().index_factory(100, "IVF100,SQfp16", 0)  # by inner product
    index.by_residual = False
    index.quantizer.add(directions)
    index.train(directions)
    index.add(rows.astype(np.float32))
    found = indexes.RecallQueries.of_rows(rows, ks=(1, 2)).recalls(index, 1)
    assert [found[k].mean() for k in (1, 2)] == [1.0, pytest.approx(0.5)]


def test_what_is_tuned_holds_for_queries_that_are_not_stored():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((60, 24))
    noisy = centres[rng.integers(60, size=6000)] + 0.8 * rng.standard_normal((6000, 24))
    stored, others = np.split(l2_normalised(noisy).astype(np.float16), [4000])
    others = others.astype(np.float32)
    index = indexes.build_index(stored, "IVF64,SQfp16")
    _, best = exact(stored, others, 10)

    def recall(nprobe):
        scores, _ = indexes.search(index, others, 10, nprobe=nprobe)
        return float((scores >= best[:, -1:] - 1e-6).mean())

    # A target that 4 lists miss by little: what a lucky sample of queries measures hides that.
    target = recall(4) + 0.003
    assert recall(8) > target
    chosen, lucky = [], 0
    for seed in range(40):
        questions = indexes.RecallQueries.of_rows(stored, count=80, seed=seed, ks=[10])
        (point,) = indexes.tune(index, questions, target=target)
        assert point.recall >= target
        chosen.append(point.nprobe)
        lucky += questions.recalls(index, 4)[10].mean() >= target
    assert lucky >= 5  # as many would have been fooled
    assert sum(nprobe < 8 for nprobe in chosen) <= 2  # of 40, at a confidence of 95%


@pytest.mark.parametrize("n", [1, 2, 5])
def test_fewer_rows_than_neighbours(vectors, n):
    index = indexes.build_index(vectors[:n], "IVF1,SQfp16")
    (point,) = indexes.tune(index, indexes.RecallQueries.of_rows(vectors[:n]))
    assert (point.k, point.nprobe, point.recall) == (n - 1, 1, 1.0)


def test_a_worse_search_measures_worse(vectors):
    index = indexes.build_index(vectors, "IVF64,SQfp16")
    questions = indexes.RecallQueries.of_rows(vectors, ks=[10])
    few, many = (questions.recalls(index, nprobe)[10].mean() for nprobe in (1, 64))
    assert few < 0.98 and many == 1.0


def test_ties_count_as_neighbours():
    same = np.repeat(l2_normalised(np.eye(4)), 50, axis=0).astype(np.float16)
    index = indexes.build_index(same, "IVF4,SQfp16")
    assert (indexes.RecallQueries.of_rows(same, ks=[10]).recalls(index, 1)[10] == 1).all()


def test_rows_that_are_a_little_farther_are_no_neighbours():
    angles = 0.002 * np.arange(100)  # the twenty nearest are within 2e-4 of each other
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    class FindsTheNextTen:
        def search(self, queries, k, params):
            ids, scores = exact(rows, queries, 1 + 2 * (k - 1))
            kept = np.r_[0, k : 2 * k - 1]
            return scores[:, kept].astype(np.float32), ids[:, kept]

    assert indexes.RecallQueries.of_rows(rows, ks=[10]).recalls(FindsTheNextTen())[10].mean() < 0.1


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "IVF16,SQfp16"])
def test_building_twice_gives_equal_bytes(vectors, factory, tmp_path):
    hashes = []
    for name in ("one", "two"):
        indexes.write_index(indexes.build_index(vectors[:800], factory), tmp_path / name)
        hashes.append(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "IVF16,SQfp16"])
def test_excluded_rows_are_never_returned(vectors, factory, tmp_path):
    indexes.write_index(indexes.build_index(vectors[:800], factory), tmp_path / "index")
    index = indexes.read_index(tmp_path / "index", rows=800, dim=24)
    queries = vectors[:10].astype(np.float32)
    nprobe = 16 if factory.startswith("IVF") else None
    deleted = np.arange(0, 800, 2)
    _, ids = indexes.search(index, queries, 5, nprobe=nprobe, excluded=deleted)
    assert (ids % 2 == 1).all()
    expected, _ = exact(vectors[1:800:2], queries, 5)
    np.testing.assert_array_equal(ids, 2 * expected + 1)
    _, ids = exact_search(vectors[:800], queries, 5, excluded=deleted)
    np.testing.assert_array_equal(ids, 2 * expected + 1)
    # What is deleted is nobody's neighbour when recall is measured either.
    questions = indexes.RecallQueries.of_rows(vectors[:800], ks=(10, 1000), excluded=deleted)
    assert questions.ks == [10, 399]
    assert all((found == 1).all() for found in questions.recalls(index, nprobe).values())


def test_many_queries_of_an_exact_index_find_what_few_find(vectors, tmp_path):
    indexes.write_index(indexes.build_index(vectors[:800], "SQfp16"), tmp_path / "index")
    index = indexes.read_index(tmp_path / "index")
    queries = vectors[800:1100].astype(np.float32)
    for deleted in (None, np.arange(0, 800, 2)):
        scores, ids = indexes.search(index, queries, 500, excluded=deleted)
        for at in (0, 299):
            one, own = indexes.search(index, queries[at : at + 1], 500, excluded=deleted)
            np.testing.assert_allclose(scores[at], one[0], atol=1e-6)
            assert len(set(ids[at]) ^ set(own[0])) <= 2  # the last ones may tie
    assert (ids[:, 400:] == -1).all() and (ids[:, :400] % 2 == 1).all()


@pytest.fixture(scope="module")
def textual():
    """Nouns in Zipf's frequencies, their references, and an index as the reducer would tune it."""
    rng = np.random.default_rng(0)
    nouns = l2_normalised(rng.standard_normal((400, 32)) + 0.5 * rng.standard_normal(32))
    weights = 1 / np.arange(1, 401)
    noun_of = rng.choice(400, size=8000, p=weights / weights.sum())
    captions = l2_normalised(nouns[noun_of] + rng.standard_normal((8000, 32)) / 6)
    rows = l2_normalised(0.9 * nouns[noun_of] + 0.1 * captions).astype(np.float16)
    index = indexes.build_index(rows, "IVF256,SQfp16")
    return nouns.astype(np.float32), rows, index


def test_class_names_find_what_is_promised_at_every_k(textual):
    nouns, rows, index = textual
    asked, others = nouns[::2], nouns[1::2]
    curve = indexes.tune(index, indexes.RecallQueries(rows, asked))
    assert tuple(point.k for point in curve) == indexes.MEASURED_K
    assert curve[0].nprobe < curve[-1].nprobe  # one setting for all would not do
    for point in curve:
        assert point.recall >= 0.95 and 0.8 <= point.worst_tenth <= point.recall
        scores, ids = indexes.search(
            index, others, point.k, nprobe=indexes.nprobe_for(point.k, curve)
        )
        best, _ = exact_search(rows, others, point.k)
        assert (scores >= best[:, -1:] - 1e-6).mean() >= 0.93
        assert (ids >= 0).all()


def test_the_worst_tenth_is_promised_something_too(textual):
    nouns, rows, index = textual
    questions = indexes.RecallQueries(rows, nouns, ks=(10,))
    for target in (0.9, 0.95):
        (point,) = indexes.tune(index, questions, target=target)
        assert point.worst_tenth >= 1 - 4 * (1 - target)
        fewer = np.sort(questions.recalls(index, point.nprobe // 2)[10])
        low = fewer.mean() - 1.645 * fewer.std() / len(fewer) ** 0.5
        assert low < target or fewer[: -(-len(fewer) // 10)].mean() < 1 - 4 * (1 - target)


def test_a_search_returns_k_rows_where_there_are_k(textual):
    nouns, _, index = textual
    deleted = np.arange(0, 8000, 4)
    for k in (350, 6000, 7000, 10**9):
        scores, ids = indexes.search(index, nouns[:5], k, nprobe=1, excluded=deleted)
        assert ids.shape == scores.shape == (5, min(k, 8000))
        there = min(k, 6000)
        assert (ids[:, :there] >= 0).all() and (ids[:, there:] == -1).all()
        assert (np.diff(scores[:, :there]) <= 1e-6).all() and np.isneginf(scores[:, there:]).all()
        assert all(len(set(row)) == there for row in ids[:, :there].tolist())
    # A query that needs more lists changes nothing for the others.
    all_at_once = indexes.search(index, nouns, 10, nprobe=1, excluded=deleted)[1]
    alone = [indexes.search(index, noun[None], 10, nprobe=1, excluded=deleted)[1] for noun in nouns]
    np.testing.assert_array_equal(all_at_once, np.concatenate(alone))


def test_nprobe_is_that_of_the_next_larger_k():
    curve = [SearchPoint(k=k, nprobe=n, recall=1, worst_tenth=1) for k, n in ((10, 2), (70, 16))]
    assert [indexes.nprobe_for(k, curve) for k in (1, 10, 11, 70)] == [2, 2, 16, 16]
    assert [indexes.nprobe_for(k, curve) for k in (71, 140)] == [17, 32]
    assert indexes.nprobe_for(5, []) is None


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "IVF16,SQfp16"])
def test_reading_refuses_other_rows_widths_and_cut_off_files(vectors, factory, tmp_path):
    path = tmp_path / "index"
    indexes.write_index(indexes.build_index(vectors[:800], factory), path)
    for rows, dim in ((801, 24), (800, 25)):
        with pytest.raises(CollectionError, match="800 vectors of width 24"):
            indexes.read_index(path, rows=rows, dim=dim)
    for content in (path.read_bytes()[:1000], b"", b"not an index"):
        path.write_bytes(content)
        with pytest.raises(CollectionError, match="cannot read the index"):
            indexes.read_index(path, rows=800, dim=24)
    with pytest.raises(CollectionError, match="cannot read the index"):
        indexes.read_index(tmp_path / "none", rows=800, dim=24)


def test_without_faiss_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r"ovref\[cpu\].*never both"):
        faiss_module()
