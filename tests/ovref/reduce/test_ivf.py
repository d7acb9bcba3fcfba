"""The inverted file made by parts, against faiss' own in memory and exhaustive comparison."""

from itertools import pairwise

import faiss
import numpy as np
import pytest

from ovref.reduce import ivf
from ovref.reduce.rows import Rows
from ovref_inference.collection import index as indexes
from ovref_inference.collection.format import write_vectors
from ovref_inference.vectors import l2_normalised

ROWS, DIM, LISTS = 1500, 16, 32


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, DIM))
    noisy = centres[rng.integers(40, size=ROWS)] + 0.3 * rng.standard_normal((ROWS, DIM))
    return l2_normalised(noisy).astype(np.float16)


@pytest.fixture
def stored(vectors, tmp_path):
    write_vectors(tmp_path / "vectors.npy", vectors)
    return tmp_path / "vectors.npy"


@pytest.fixture(scope="module")
def centroids(vectors):
    return ivf.train(vectors.astype(np.float32), LISTS, seed=0)


def owners(vectors, centroids):
    return (vectors.astype(np.float64) @ centroids.astype(np.float64).T).argmax(axis=1)


def parts_of(stored, centroids, cuts, out):
    cells = ivf.cells_of(centroids)
    return [ivf.write_part(stored, cells, a, b, out / f"part{a}") for a, b in pairwise(cuts)]


def test_rows_are_read_as_the_matrix_has_them(stored, vectors):
    rows = Rows(stored)
    assert rows.shape == vectors.shape and len(rows) == ROWS
    several = [[9, 2, 3, 2, 1499], [4, 5, 6], [1499], [4, 6, 6], [6, 5, 4], [3, 5, 4, 6]]
    for key in (slice(3, 9), slice(1490, 9999), slice(5, 5), *map(np.array, several)):
        np.testing.assert_array_equal(rows[key], vectors[key])
    assert rows[np.zeros(0, dtype=np.int64)].shape == (0, DIM)
    with pytest.raises(ValueError, match="step of a slice of rows must be 1"):
        rows[::2]


def test_training_in_two_levels_is_about_as_good_as_in_one(vectors, centroids):
    x = vectors.astype(np.float32)
    assert centroids.shape == (LISTS, DIM)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    plain = faiss.Kmeans(DIM, LISTS, niter=10, spherical=True, min_points_per_centroid=1)
    plain.train(x)
    ours, theirs = ((x @ c.T).max(axis=1).mean() for c in (centroids, plain.centroids))
    assert ours > 0.97 * theirs


def test_training_copes_with_fewer_rows_than_lists_and_with_duplicates():
    few = np.eye(4, dtype=np.float32)
    assert ivf.train(few, 8, seed=0).shape == (8, 4)
    same = np.repeat(np.eye(4, dtype=np.float32)[:2], 50, axis=0)
    found = ivf.train(same, 8, seed=0)
    assert np.isfinite(found).all() and (same @ found.T).max(axis=1).min() > 0.999


def test_gpus_train_over_all_centroids_at_once(vectors, monkeypatch):
    # A machine without GPUs: faiss' index for the CPU takes the place of its clones on GPUs.
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index: index, raising=False)
    x = vectors.astype(np.float32)
    found = ivf.train(x, LISTS, seed=0)
    assert found.shape == (LISTS, DIM)
    assert (x @ found.T).max(axis=1).mean() > 0.85


def test_all_cells_probed_is_exact_assignment(vectors, centroids, monkeypatch):
    cells = ivf.cells_of(centroids)
    assert sorted(cells.numbers) == list(range(LISTS))
    monkeypatch.setattr(ivf, "CELLS_PROBED", len(cells.centres))
    np.testing.assert_array_equal(
        ivf.assign(vectors.astype(np.float32), cells), owners(vectors, centroids)
    )


def test_few_cells_probed_are_nearly_exact(vectors, centroids, monkeypatch):
    monkeypatch.setattr(ivf, "CELLS_PROBED", 3)
    found = ivf.assign(vectors.astype(np.float32), ivf.cells_of(centroids))
    assert (found == owners(vectors, centroids)).mean() > 0.9


@pytest.mark.parametrize("lists", [LISTS, 2, 1000])  # full, single and mostly empty lists
def test_merged_on_disk_is_what_faiss_would_have_written(stored, vectors, tmp_path, lists):
    centroids = l2_normalised(np.random.default_rng(1).standard_normal((lists, DIM)))
    cells = ivf.cells_of(centroids)
    factory = f"IVF{lists},SQfp16"
    parts = parts_of(stored, centroids, [0, 600, 1200, ROWS], tmp_path)
    ivf.merge(ivf.empty_index(factory, centroids), parts, tmp_path / "merged")
    in_memory = ivf.empty_index(factory, centroids)
    x = vectors.astype(np.float32)
    owner = np.concatenate(
        [ivf.assign(x[a:b], cells) for a, b in ((0, 600), (600, 1200), (1200, ROWS))]
    )
    in_memory.add_core(ROWS, faiss.swig_ptr(x), None, faiss.swig_ptr(owner))
    faiss.write_index(in_memory, str(tmp_path / "reference"))
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "reference").read_bytes()
    found = indexes.read_index(tmp_path / "merged", rows=ROWS, dim=DIM)
    _, ids = indexes.search(found, x[:20], 5, nprobe=lists)
    exact = np.argsort(-(x[:20] @ x.T), axis=1, kind="stable")[:, :5]
    assert (ids == exact).mean() > 0.97  # but for ties


def test_an_hnsw_quantiser(stored, centroids, vectors, tmp_path):
    index = ivf.empty_index(f"IVF{LISTS}_HNSW8,SQfp16", centroids)
    parts = parts_of(stored, centroids, [0, ROWS], tmp_path)
    ivf.merge(index, parts, tmp_path / "merged")
    found = indexes.read_index(tmp_path / "merged", rows=ROWS, dim=DIM)
    np.testing.assert_array_equal(ivf.centroids_of(found), centroids)
    recalls = indexes.RecallQueries.of_rows(vectors, ks=[10]).recalls(found, LISTS)
    assert recalls[10].mean() > 0.99


def test_entries_of_an_index_come_back_as_a_part(stored, centroids, tmp_path):
    whole = parts_of(stored, centroids, [0, 700], tmp_path)
    ivf.merge(ivf.empty_index(f"IVF{LISTS},SQfp16", centroids), whole, tmp_path / "index")
    old = ivf.part_of_index(tmp_path / "index", 500, tmp_path / "old")
    (first,) = parts_of(stored, centroids, [0, 500], tmp_path)
    np.testing.assert_array_equal(old.sizes, first.sizes)
    assert old.codes.read_bytes() == first.codes.read_bytes()
    assert old.ids.read_bytes() == first.ids.read_bytes()
    np.testing.assert_array_equal(ivf.read_part(tmp_path / "old").sizes, old.sizes)
