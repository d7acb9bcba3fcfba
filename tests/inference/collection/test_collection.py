"""`ReferenceCollection` against brute force, and against every kind of damage."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ovref_inference import CollectionError, ReferenceCollection
from ovref_inference.collection import format as fmt
from ovref_inference.collection import index as indexes
from ovref_inference.collection import store
from ovref_inference.collection.clustering import spherical_kmeans
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.vectors import l2_normalised


@pytest.fixture
def collection(published):
    with ReferenceCollection.open(published) as opened:
        yield opened


def brute_force(vectors, queries, k):
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


def test_search_text_and_regions_agree_with_brute_force(collection, built):
    rng = np.random.default_rng(1)
    for kind, dim in (("textual", 12), ("visual", 16)):
        queries = rng.standard_normal((7, dim))
        search = {"textual": collection.search_text, "visual": collection.search_regions}[kind]
        support = search(queries, k=9)
        ids, scores = brute_force(getattr(built, kind), l2_normalised(queries), 9)
        np.testing.assert_array_equal(support.ids, ids)
        np.testing.assert_allclose(support.scores, scores, atol=1e-3)
        assert support.ids.dtype == np.int64


def test_an_inverted_index_is_searched_with_its_own_parameters(built, tmp_path):
    folder = built.write(tmp_path / "scratch")
    index = indexes.build_index(built.textual, "IVF4,SQfp16")
    indexes.write_index(index, folder / fmt.FILES["textual_index"])
    deleted = [3, 17]
    columns = fmt.tombstone_columns(deleted, "opt-out")
    fmt.write_table(folder / fmt.FILES["tombstones"], fmt.TOMBSTONE_SCHEMA, columns)
    ids, _ = brute_force(built.textual, built.noun_embeddings, len(built.textual))
    alive = [row[~np.isin(row, deleted)][:9] for row in ids]
    curve = (
        fmt.SearchPoint(k=9, nprobe=1, recall=0.5, worst_tenth=0.5),
        fmt.SearchPoint(k=50, nprobe=4, recall=1.0, worst_tenth=1.0),
    )
    info = fmt.IndexInfo(factory="IVF4,SQfp16", curve=curve, queries="class names")
    manifest = dataclasses.replace(built.manifest(), textual_index=info)
    store.publish(folder, str(tmp_path / "published"), manifest)
    asked = []
    with ReferenceCollection.open(tmp_path / "published") as opened:
        assert opened.manifest == store.read_manifest(str(tmp_path / "published"))
        search = opened._textual_index.index.search
        opened._textual_index.index.search = lambda queries, k, params: (
            asked.append(params.nprobe), search(queries, k, params=params),
        )[1]  # fmt: skip
        np.testing.assert_array_equal(
            opened.search_text(built.noun_embeddings, k=10).ids[:, :9], alive
        )
        np.testing.assert_array_equal(
            opened.search_text(built.noun_embeddings, k=3).ids, [row[:3] for row in alive]
        )
    assert asked[:2] == [4, 1]


def test_a_collection_of_format_version_1_opens(built, tmp_path):
    """Its one search setting, tuned for one k, becomes the first point of the curve."""
    folder = built.write(tmp_path / "scratch")
    index = indexes.build_index(built.textual, "IVF4,SQfp16")
    indexes.write_index(index, folder / fmt.FILES["textual_index"])
    store.publish(folder, str(tmp_path / "old"), built.manifest())
    path = tmp_path / "old" / fmt.MANIFEST
    tree = json.loads(path.read_text())
    tree["format_version"] = 1
    flat = {"factory": "Flat", "search": {}, "recall": 1.0, "recall_k": 0, "train_rows": 0}
    tree["visual_index"] = flat
    tree["textual_index"] = flat | {
        "factory": "IVF4,SQfp16", "search": {"nprobe": 2}, "recall": 0.96, "recall_k": 10,
    }  # fmt: skip
    path.write_text(json.dumps(tree))
    with ReferenceCollection.open(tmp_path / "old") as opened:
        (point,) = opened.manifest.textual_index.curve
        assert point == fmt.SearchPoint(k=10, nprobe=2, recall=0.96, worst_tenth=None)
        assert opened.manifest.visual_index.curve == ()
        assert (opened.search_text(built.noun_embeddings, k=len(built.textual)).ids >= 0).all()
    # What is written to it is of the present version.
    store.tombstone(str(tmp_path / "old"), [3], "opt-out")
    assert json.loads(path.read_text())["format_version"] == fmt.FORMAT_VERSION
    with ReferenceCollection.open(tmp_path / "old") as opened:
        assert opened.manifest.textual_index.curve == (point,)


class Tensor:
    """What torch's tensors refuse and offer: they turn into arrays on the CPU, detached, float."""

    def __init__(self, values, ready=frozenset()):
        self._values, self._ready = values, ready

    def _with(self, step):
        return Tensor(self._values, self._ready | {step})

    def detach(self):
        return self._with("detach")

    def cpu(self):
        return self._with("cpu")

    def float(self):
        return self._with("float")

    def numpy(self):
        assert self._ready == {"detach", "cpu", "float"}
        return self._values

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert a tensor that requires grad, is bfloat16, or on a device")


def test_tensors_of_any_kind_are_queries(collection, built):
    for search, queries in (
        (collection.search_text, built.noun_embeddings),
        (collection.search_regions, built.visual[:4].astype(np.float32)),
    ):
        np.testing.assert_array_equal(search(Tensor(queries), k=5).ids, search(queries, k=5).ids)
    texts = built.noun_embeddings
    for ask in (
        lambda it: collection.fossil_prototypes(it, n=9, k=2),
        lambda it: collection.prototypes(["an oak"] * len(texts), text_embeddings=it),
    ):
        np.testing.assert_array_equal(ask(Tensor(texts)).vectors_nkd, ask(texts).vectors_nkd)


def test_queries_need_not_be_normalised(collection, built):
    one = collection.search_text(built.noun_embeddings, k=5)
    other = collection.search_text(built.noun_embeddings * 7.5, k=5)
    np.testing.assert_array_equal(one.ids, other.ids)


def test_support_reads_vectors_and_nouns(collection, built):
    support = collection.search_text(built.noun_embeddings, k=3)
    np.testing.assert_array_equal(support.visual, built.visual[support.ids].astype(np.float32))
    np.testing.assert_array_equal(support.textual, built.textual[support.ids].astype(np.float32))
    assert support.nouns == [[built.nouns[built.noun_of[i]] for i in row] for row in support.ids]


@pytest.mark.parametrize("more", [5, 10**9, 2**62])
def test_asking_for_more_than_there_is_gives_all(collection, built, more):
    n = len(built.visual)
    support = collection.search_regions(np.ones((2, 16)), k=n + more)
    assert support.ids.shape == (2, n)
    assert sorted(support.ids[0]) == list(range(n))
    found = collection.fossil_prototypes(built.noun_embeddings[:1], n=n + more, k=3)
    assert found.counts.tolist() == [3]


def test_deleted_references_leave_minus_one_at_the_end(published, built):
    store.tombstone(str(published), list(range(0, len(built.visual), 2)), "opt-out")
    with ReferenceCollection.open(published) as collection:
        n = len(collection)
        support = collection.search_regions(np.ones((2, 16)), k=n + 5)
        assert (support.ids[:, :n] >= 0).all() and (support.ids[:, n:] == -1).all()
        assert np.isneginf(support.scores[:, n:]).all() and (support.visual[:, n:] == 0).all()
        assert support.nouns[0][n:] == [None] * 5
        assert (support.noun_rows[:, n:] == -1).all()


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.ones((2, 11)), 1, r"test-textual: expected textual embeddings \(n, 12\)"),
        (np.ones(12), 1, "expected textual"),
        (np.zeros((1, 12)), 1, "zero or not finite"),
        (np.full((1, 12), np.nan), 1, "zero or not finite"),
        (np.ones((1, 12)), 0, "k must be at least 1"),
    ],
)
def test_bad_queries_are_refused(collection, queries, k, message):
    with pytest.raises(ValueError, match=message):
        collection.search_text(queries, k)


def test_no_queries_give_no_results(collection):
    assert collection.search_regions(np.zeros((0, 16)), k=4).ids.shape == (0, 4)


def test_fossil_prototypes_cluster_what_was_retrieved(collection, built):
    found = collection.fossil_prototypes(built.noun_embeddings, n=12, k=3, seed=5)
    assert found.vectors_nkd.shape == (5, 3, 16)
    assert found.counts.tolist() == [3] * 5
    ids, _ = brute_force(built.textual, built.noun_embeddings, 12)
    for row in range(5):
        expected = spherical_kmeans(built.visual[ids[row]], 3, seed=5)
        np.testing.assert_allclose(found.vectors_nkd[row], expected, atol=1e-5)


def test_fossil_prototypes_with_fewer_references_than_clusters(collection, built):
    found = collection.fossil_prototypes(built.noun_embeddings[:1], n=2, k=6)
    assert found.vectors_nkd.shape == (1, 2, 16) and found.counts.tolist() == [2]


def test_stored_prototypes_and_rare_nouns_by_neighbours(collection, built):
    found = collection.prototypes(["Dog ", "lion"])
    dog, lion = (built.nouns.index(noun) for noun in ("dog", "lion"))
    np.testing.assert_array_equal(found.vectors_nkd[0], built.prototypes[dog][0])
    np.testing.assert_array_equal(found.vectors_nkd[1], built.prototypes[lion][0])
    assert found.nouns == (("dog",), ("lion", "cat"))


def test_stored_and_fresh_prototypes_agree(collection, built):
    """The builder's rule and the query's are one: recomputing gives what is stored."""
    for row, (stored, used) in enumerate(built.prototypes):
        ((fresh, fresh_used),) = collection._fresh(
            [row], built.noun_embeddings[[row]], built.config
        )
        assert fresh_used == used
        np.testing.assert_allclose(fresh, stored.astype(np.float32), atol=1e-3)


def test_prototypes_of_an_unknown_name_come_from_its_neighbours(collection, built):
    near_tree = built.noun_embeddings[built.nouns.index("tree")][None]
    found = collection.prototypes(["oak"], text_embeddings=near_tree)
    assert found.nouns == (("tree",),)
    assert found.counts.tolist() == [4]


def test_what_is_stored_needs_no_text_embeddings(collection, built, monkeypatch):
    """They are nearly all of nouns.parquet, and of a large vocabulary hundreds of megabytes."""

    def read(path):
        raise AssertionError("not needed")

    monkeypatch.setattr("ovref_inference.collection.nouns.read_noun_embeddings", read)
    found = collection.prototypes(built.nouns)
    assert found.counts.tolist() == [len(vectors) for vectors, _ in built.prototypes]
    with pytest.raises(AssertionError, match="not needed"):
        collection.prototypes(["boat", "lion"], k=2)


def test_another_k_is_clustered_now(collection, built):
    found = collection.prototypes(["boat", "lion"], k=2)
    rows = collection.references_of("boat")
    expected = spherical_kmeans(built.visual[rows], 2, iterations=built.config.iterations)
    np.testing.assert_allclose(found.vectors_nkd[0], expected, atol=1e-5)
    assert found.counts.tolist() == [2, 2]


def test_k_above_all_references_takes_every_noun(collection, built):
    found = collection.prototypes(["lion"], k=500)
    assert set(found.nouns[0]) == set(built.nouns)
    assert found.counts.tolist() == [len(built.visual)]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "one or more non-empty"),
        (["cat", " "], {}, "one or more non-empty"),
        ("cat", {}, "must be a list of .*found 'cat'"),
        (["cat"], {"k": 0}, "k must be at least 1"),
        (["cat"], {"k": 10**9}, "k must be at most max_references, found 1000000000 and 50000"),
        (["cat"], {"text_embeddings": np.ones((2, 12))}, "1 names but 2"),
        (["cat"], {"text_embeddings": np.ones((1, 3))}, "expected textual"),
    ],
)
def test_bad_names_are_refused(collection, names, options, message):
    with pytest.raises(ValueError, match=message):
        collection.prototypes(names, **options)


def test_rows_are_read_by_id_in_the_order_asked(collection, built):
    rows = collection.rows([7, 3, 7])
    assert [row["id"] for row in rows] == [7, 3, 7]
    assert rows[1]["caption"] == built.references()["caption"][3]
    assert rows[1]["seed"] == 3 and collection.rows([4])[0]["seed"] is None
    with pytest.raises(ValueError, match="no references"):
        collection.rows([len(built.visual)])


def test_references_of_a_noun(collection, built):
    for row, noun in enumerate(built.nouns):
        expected = np.flatnonzero(built.noun_of == row)
        np.testing.assert_array_equal(collection.references_of(noun), expected)
        np.testing.assert_array_equal(collection.references_of(f" {noun.title()}"), expected)
    assert len(collection.references_of("unicorn")) == 0


def test_references_are_found_by_key_source_or_noun(published, built):
    with ReferenceCollection.open(published) as collection:
        rows = collection.rows(range(len(collection)))
        n = len(rows)
        assert collection.ids_of().tolist() == []
        assert collection.ids_of(nouns=["cat", "unheard of"]).tolist() == [
            i for i in range(n) if rows[i]["noun"] == "cat"
        ]
        assert collection.ids_of(sources=[rows[0]["source"]]).tolist() == [
            i for i in range(n) if rows[i]["source"] == rows[0]["source"]
        ]
        key, image = rows[3]["key"], rows[9]["key"].partition("#")[0]
        assert collection.ids_of(keys=[key, image]).tolist() == [
            i for i in range(n) if rows[i]["key"] == key or rows[i]["key"].startswith(f"{image}#")
        ]
        both = collection.ids_of(keys=[key], nouns=["cat"])
        assert set(both) == {3} | set(collection.ids_of(nouns=["cat"]))
    store.tombstone(str(published), [3], "opt-out")
    with ReferenceCollection.open(published) as collection:
        assert 3 not in collection.ids_of(keys=[key])


def test_deleted_references_never_return(published, built):
    deleted = np.flatnonzero(built.noun_of == built.nouns.index("cat"))[:28].tolist()
    store.tombstone(str(published), deleted[:20], "opt-out")
    manifest = store.tombstone(str(published), deleted[10:], "bad source")
    assert manifest.counts["tombstones"] == 28
    with ReferenceCollection.open(published, verify="full") as collection:
        n = len(built.visual)
        assert len(collection) == n - 28
        for support in (
            collection.search_text(built.noun_embeddings, k=n),
            collection.search_regions(built.visual[deleted], k=n),
        ):
            assert not np.isin(support.ids, deleted).any()
            assert (support.ids[:, n - 28 :] == -1).all()
        assert not np.isin(collection.references_of("cat"), deleted).any()
        # Stored prototypes of "cat", and of "lion" that leaned on it, hold no more.
        found = collection.prototypes(["cat", "lion", "dog"])
        assert found.nouns[0][0] == "cat" and len(found.nouns[0]) > 1
        dog = built.nouns.index("dog")
        np.testing.assert_array_equal(found.vectors_nkd[2], built.prototypes[dog][0])
        with pytest.raises(ValueError, match="deleted"):
            collection.rows(deleted[:1])
    table = fmt.open_table(
        published / manifest.files["tombstones"].path, fmt.TOMBSTONE_SCHEMA
    ).read()
    reasons = dict(zip(*table.to_pydict().values(), strict=True))
    assert reasons[deleted[15]] == "opt-out" and reasons[deleted[25]] == "bad source"


def test_tombstones_that_a_reduction_knew_leave_stored_prototypes_in_force(
    published, built, tmp_path, monkeypatch
):
    deleted = np.flatnonzero(built.noun_of == built.nouns.index("dog"))[:2].tolist()
    store.tombstone(str(published), deleted, "opt-out")
    folder = built.write(tmp_path / "reduced")
    columns = fmt.tombstone_columns(deleted, "opt-out")
    fmt.write_table(folder / fmt.FILES["tombstones"], fmt.TOMBSTONE_SCHEMA, columns)
    manifest = store.publish(folder, str(published), built.manifest())
    assert manifest.settled_tombstones == 2

    def stored(collection, noun):
        return collection._stored([built.nouns.index(noun)]) != [None]

    with ReferenceCollection.open(published) as collection:
        assert stored(collection, "dog") and stored(collection, "cat")
        assert len(collection.references_of("dog")) == 23
    # A deletion after that, of a lower id than the first, counts for its own noun alone.
    store.tombstone(str(published), [int(np.flatnonzero(built.noun_of == 1)[0])], "late")
    with ReferenceCollection.open(published) as collection:
        assert built.nouns[1] == "cat"
        assert stored(collection, "dog") and not stored(collection, "cat")


def test_encoder_settings_come_back_as_configs(published):
    visual = {"model": "miniature:dinov2", "size_hw": [64, 64]}
    rewrite(published, lambda tree: tree["visual"].update(settings=visual))
    rewrite(published, lambda tree: tree["textual"].update(settings={"model": "miniature:clip"}))
    with ReferenceCollection.open(published) as collection:
        expected = VisualEncoderConfig(model="miniature:dinov2", size_hw=(64, 64))
        assert collection.visual_config == expected
        assert collection.text_config == TextEncoderConfig(model="miniature:clip")
        # Twelve dimensions here, 64 there: the encoder is loaded, and found not to belong.
        with pytest.raises(ValueError, match=r"expected textual embeddings \(n, 12\)"):
            collection.search_text(collection.embed_text(["red panda"]), k=1)
    rewrite(published, lambda tree: tree["textual"].update(settings={"name": "x"}))
    with (
        ReferenceCollection.open(published) as collection,
        pytest.raises(CollectionError, match="no TextEncoderConfig"),
    ):
        collection.embed_text(["red panda"])


def test_rows_from_several_threads(published, built):
    captions = built.references()["caption"]
    with ReferenceCollection.open(published) as collection, ThreadPoolExecutor(4) as pool:
        ids = [[i, (7 * i) % len(captions)] for i in range(60)]
        for pair, rows in zip(ids, pool.map(collection.rows, ids), strict=True):
            assert [row["caption"] for row in rows] == [captions[i] for i in pair]


def test_questions_from_several_threads_at_once(published, built):
    """A collection just opened reads much of what it needs at the first question."""
    texts = built.noun_embeddings
    asks = (
        lambda it: it.prototypes(built.nouns).vectors_nkd,
        lambda it: it.prototypes(built.nouns, k=3).vectors_nkd,
        lambda it: it.fossil_prototypes(texts, n=9, k=2).vectors_nkd,
        lambda it: it.search_regions(built.visual[:7], k=5).noun_rows,
        lambda it: it.search_text(texts, k=5).visual,
    )
    with ReferenceCollection.open(published) as collection:
        expected = [ask(collection) for ask in asks]
    for _ in range(5):
        with ReferenceCollection.open(published) as collection, ThreadPoolExecutor(8) as pool:
            for found, wanted in zip(
                pool.map(lambda ask: ask(collection), asks * 8), expected * 8, strict=True
            ):
                np.testing.assert_array_equal(found, wanted)


def test_a_collection_of_which_all_is_deleted_gives_nothing(published, built):
    store.tombstone(str(published), list(range(len(built.visual))), "opt-out")
    with ReferenceCollection.open(published) as collection:
        assert len(collection) == 0
        assert (collection.search_regions(np.ones((1, 16)), k=3).ids == -1).all()
        assert collection.prototypes(["cat"]).counts.tolist() == [0]
        found = collection.fossil_prototypes(built.noun_embeddings, n=3, k=2)
        assert found.counts.tolist() == [0] * 5 and found.vectors_nkd.shape == (5, 0, 16)


def test_a_missing_collection_is_named(tmp_path):
    with pytest.raises(CollectionError, match=r"no reference collection at .*collection\.json"):
        ReferenceCollection.open(tmp_path / "nowhere")


def test_the_output_of_a_build_is_no_collection_but_has_one(published):
    assert published.name == "collection"
    with pytest.raises(CollectionError, match=f"there is one at {published}$"):
        ReferenceCollection.open(published.parent)


@pytest.mark.parametrize("name", sorted(fmt.FILES.values()))
def test_each_missing_or_cut_off_or_damaged_file_is_named(published, name):
    path = published / name
    content = path.read_bytes()
    changed = bytearray(content)
    changed[-1] ^= 1
    for damage, message in (
        (content[:-1], "truncated"),
        (bytes(changed), "checksum"),
        (None, "is missing"),
    ):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(CollectionError, match=f"{name}.*{message}"):
            ReferenceCollection.open(published)


def rewrite(folder: Path, change) -> None:
    path = folder / fmt.MANIFEST
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(format_version=7), "version 7, this program reads 1, 2, 3,"),
        (lambda tree: tree.update(format_version=4), "not a manifest of format version 4"),
        (lambda tree: tree.update(format_version=3), "stores embeddings as 'float16'"),
        (lambda tree: tree.update(embeddings="int8"), "stores embeddings as 'int8'"),
        (lambda tree: tree.pop("format_version"), "not the manifest"),
        (lambda tree: tree.update(surprise=1), "surprise"),
        (lambda tree: tree.pop("visual"), "visual"),
        (lambda tree: tree["files"].pop("nouns"), "names no file for nouns"),
        (lambda tree: tree["files"]["nouns"].update(path="../x"), "outside its folder"),
        (lambda tree: tree["visual"].update(dim=17), "has width 16"),
        (lambda tree: tree["counts"].update(references=1), "the manifest counts"),
        (lambda tree: tree["prototypes"].update(k=0), "k must be at least 1"),
        (lambda tree: tree["textual"].update(dim=11), "has width 12"),
    ],
)
def test_a_foreign_manifest_is_refused(published, change, message):
    rewrite(published, change)
    with pytest.raises(CollectionError, match=message):
        ReferenceCollection.open(published)


def test_a_cut_off_manifest_is_refused(published):
    path = published / fmt.MANIFEST
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CollectionError, match="truncated"):
        ReferenceCollection.open(published)
    path.write_text("[]")
    with pytest.raises(CollectionError, match="not the manifest"):
        ReferenceCollection.open(published)


def test_results_stay_valid_after_closing(published, built):
    with ReferenceCollection.open(published) as collection:
        found = collection.prototypes(["dog"])
        support = collection.search_text(built.noun_embeddings, k=2)
        vectors = support.visual
    assert found.vectors_nkd.any() and vectors.any() and (support.ids >= 0).all()


def test_a_closed_collection_says_so(published, built):
    with ReferenceCollection.open(published) as collection:
        support = collection.search_text(built.noun_embeddings, k=2)
        collection.close()
        for ask in (
            lambda: support.visual,
            lambda: collection.search_regions(built.visual[:1], k=2),
            lambda: collection.prototypes(["dog"]),
            lambda: collection.rows([1]),
            lambda: len(collection),
        ):
            with pytest.raises(ValueError, match="is closed"):
                ask()
        with pytest.raises(AttributeError, match="no attribute 'visuals'"):
            collection.visuals  # noqa: B018
    collection.close()


def test_numbers_of_numpy_are_numbers_and_others_are_not(collection, built):
    found = collection.search_text(built.noun_embeddings, np.int64(3))
    assert found.ids.shape == (5, 3)
    assert collection.prototypes(np.array(["dog", "cat"])).nouns == (("dog",), ("cat",))
    for k in (2.5, "3", None):
        with pytest.raises(TypeError, match="integer"):
            collection.search_text(built.noun_embeddings, k)
    with pytest.raises(ValueError, match="n must be at least 1, found 0"):
        collection.fossil_prototypes(built.noun_embeddings, n=0, k=2)
