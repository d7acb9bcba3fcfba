"""Partitioned collections, compared with the undivided collection of the same references."""

import asyncio
import dataclasses
import json
import os
import pickle
import shutil
import tracemalloc
from pathlib import Path

import faiss
import fsspec
import numpy as np
import pytest

from hub_server import Hub
from ovref_inference import CollectionError, ReferenceCollection
from ovref_inference.collection import format as fmt
from ovref_inference.collection import index as indexes
from ovref_inference.collection import joined_index, opening, remote, store
from ovref_inference.collection.joined_index import JoinedIndex
from ovref_inference.collection.parts import TunedIndex
from ovref_inference.collection.prototypes import make_prototypes
from ovref_inference.collection.remote import RemoteVectors
from ovref_inference.collection.remote_index import LIST_BYTES
from ovref_inference.vectors import l2_normalised
from partitioned import Divided

GROUPS = [["boat", "cat"], ["dog"], ["lion", "tree"]]
FIRST = fmt.PARTITION_IDS


@pytest.fixture(scope="module")
def divided(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("divided")
    return Divided(built, GROUPS, folder / "scratch", str(folder / "collection"))


@pytest.fixture
def changed(divided, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(divided.url, tmp_path / "changed")
    return str(tmp_path / "changed")


@pytest.fixture
def both(divided, published):
    """The partitioned collection and the undivided one."""
    with ReferenceCollection.open(divided.url) as a, ReferenceCollection.open(published) as b:
        yield a, b


def assert_searches_equally(divided, a, b, *, ks=(1, 5, 30, 70, 1000)):
    built = divided.built
    rng = np.random.default_rng(1)
    queries = {
        "search_text": np.concatenate([built.noun_embeddings, rng.standard_normal((3, 12))]),
        "search_regions": np.concatenate([built.visual[:4], rng.standard_normal((3, 16))]),
    }
    for search, vectors in queries.items():
        for k in ks:
            found, expected = getattr(a, search)(vectors, k), getattr(b, search)(vectors, k)
            np.testing.assert_array_equal(divided.undivided(found.ids), expected.ids)
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
            np.testing.assert_array_equal(found.visual, expected.visual)
            np.testing.assert_array_equal(found.textual, expected.textual)
            np.testing.assert_array_equal(found.noun_rows, expected.noun_rows)
            assert found.nouns == expected.nouns


def test_searches_find_what_they_find_in_the_undivided_collection(divided, both):
    """Also more neighbours than a partition holds, and than all do."""
    assert_searches_equally(divided, *both)


def test_the_vocabulary_and_the_references_are_those_of_the_undivided_collection(divided, both):
    a, b = both
    assert len(a) == len(b) and a.nouns == b.nouns == ["boat", "cat", "dog", "lion", "tree"]
    np.testing.assert_array_equal(a.noun_counts, b.noun_counts)
    np.testing.assert_array_equal(a.noun_embeddings, b.noun_embeddings)
    for noun in [*a.nouns, "zebra"]:
        ids = a.references_of(noun)
        np.testing.assert_array_equal(divided.undivided(ids), b.references_of(noun))
        assert ids.tolist() == sorted(ids)
    some = np.random.default_rng(0).permutation(len(b.visual))[:20]
    rows = a.rows(divided.ids[some])
    assert [row.pop("id") for row in rows] == divided.ids[some].tolist()
    assert rows == [{k: v for k, v in row.items() if k != "id"} for row in b.rows(some)]
    origin = {"keys": [f"{7:024x}", f"{9:024x}#0"], "nouns": ["lion"]}
    found = a.ids_of(**origin)
    assert found.tolist() == sorted(divided.ids[b.ids_of(**origin)])
    assert len(a.ids_of(sources=["daam"])) == len(b)
    np.testing.assert_array_equal(a.noun_rows([[divided.ids[3], -1]]), b.noun_rows([[3, -1]]))
    table = a.to_table()
    assert table.schema.equals(b.to_table().schema)
    assert table.column("id").to_pylist() == sorted(divided.ids)
    assert a.to_table(["key"]).column("key").to_pylist() == [row["key"] for row in a.rows(
        table.column("id").to_numpy()
    )]  # fmt: skip
    assert "118 references of 5 nouns" in repr(a)


def test_matrices_are_read_by_ids(divided, both):
    a, b = both
    assert a.visual.shape == b.visual.shape and len(a.textual) == len(b.textual)
    order = np.argsort(divided.ids)
    np.testing.assert_array_equal(np.asarray(a.visual), b.visual[order])
    np.testing.assert_array_equal(np.stack(list(a.visual)), b.visual[order])
    np.testing.assert_array_equal(a.textual[FIRST : FIRST + 3], b.textual[order][70:73])
    np.testing.assert_array_equal(a.textual[68 : FIRST + 1], b.textual[order][68:71])
    np.testing.assert_array_equal(a.visual[divided.ids[[[5, 2]]]], b.visual[[[5, 2]]])
    np.testing.assert_array_equal(a.visual[divided.ids[5]], b.visual[5])
    for bad in (FIRST - 1, 3 * FIRST, -1, slice(0, 9, 2), slice(-3, None), np.ones(118, bool)):
        with pytest.raises(IndexError):
            a.visual[bad]


def test_prototypes_are_those_of_the_undivided_collection(divided, both):
    """For known nouns, for unknown ones that borrow from another partition, and by retrieval."""
    built = divided.built
    near = l2_normalised(built.noun_embeddings + 0.05)
    names = ["boat", "zebra", "Dog ", "mule", "tree", "qqq"]
    texts = np.concatenate([near, -near[:1]])
    for floor in (None, 0.45):
        for k in (None, 3):
            found, expected = (
                one.prototypes(names, k, text_embeddings=texts, floor=floor) for one in both
            )
            np.testing.assert_array_equal(found.counts, expected.counts)
            assert found.nouns == expected.nouns and found.support == expected.support
            for vectors, others, nouns in zip(
                found.vectors_nkd, expected.vectors_nkd, found.nouns, strict=True
            ):
                if len(nouns) > 1:  # of several partitions
                    others = in_their_order(divided, nouns, k)
                np.testing.assert_allclose(vectors, others, atol=1e-6)
    assert [one.source for one in found.support[:4]] == ["own", "borrowed", "own", "borrowed"]
    found, expected = (one.fossil_prototypes(texts, n=30, k=4) for one in both)
    np.testing.assert_allclose(found.vectors_nkd, expected.vectors_nkd, atol=1e-6)


def test_a_rare_noun_borrows_within_its_partition(divided, changed):
    """`lion` is nearest to `cat`, which is in another partition; of its own there is `tree`."""
    built = divided.built
    lion, tree = (np.flatnonzero(built.noun_of == built.nouns.index(n)) for n in ("lion", "tree"))

    def lions(k=None):
        with ReferenceCollection.open(changed) as whole:
            found = whole.prototypes(["lion"], k, text_embeddings=built.noun_embeddings[3:4])
        return found.vectors_nkd[0], found.nouns[0], found.support[0].source

    def expected(rows, k=4):
        rows = rows[np.argsort(divided.ids[rows])]
        return make_prototypes(built.visual[rows], dataclasses.replace(built.config, k=k))

    rows = np.union1d(lion, tree)
    stored, nouns, source = lions()
    assert (nouns, source) == (("lion", "tree"), "own")
    np.testing.assert_array_equal(stored, expected(rows).astype(np.float16))  # as it is stored
    three, nouns, _ = lions(k=3)
    assert nouns == ("lion", "tree")
    np.testing.assert_array_equal(three, expected(rows, k=3))
    store.tombstone(changed, divided.ids[tree[:15]].tolist(), "opt-out")
    left, nouns, source = lions()
    assert (nouns, source) == (("lion", "tree"), "own")
    np.testing.assert_array_equal(left, expected(np.setdiff1d(rows, tree[:15])))
    # Without references it borrows as an unknown noun does, from all partitions.
    store.tombstone(changed, divided.ids[lion].tolist(), "opt-out")
    assert lions()[1:] == (("cat",), "borrowed")


def in_their_order(divided, nouns, k):
    """Prototypes of several nouns' references in the order of their ids, on which k-means
    depends."""
    built = divided.built
    rows = np.flatnonzero(np.isin(built.noun_of, [built.nouns.index(noun) for noun in nouns]))
    config = dataclasses.replace(built.config, k=k or built.config.k)
    return make_prototypes(built.visual[rows[np.argsort(divided.ids[rows])]], config)


def test_deleted_references_are_left_out_everywhere(divided, changed, published):
    """One partition loses all of its references, another some."""
    built = divided.built
    dogs = np.flatnonzero(built.noun_of == built.nouns.index("dog"))
    gone = np.union1d(dogs, [0, 1, 2, 3]).tolist()
    store.tombstone(changed, divided.ids[gone].tolist(), "opt-out")
    store.tombstone(str(published), gone, "opt-out")
    assert sorted(store.read_tombstones(changed)["id"]) == sorted(divided.ids[gone])
    with ReferenceCollection.open(changed) as a, ReferenceCollection.open(published) as b:
        assert len(a) == len(b) and a.manifest.counts["tombstones"] == len(gone)
        assert_searches_equally(divided, a, b)
        np.testing.assert_array_equal(a.noun_counts, b.noun_counts)
        assert a.references_of("dog").tolist() == []
        assert len(a.to_table()) == len(b)
        assert sorted(a.ids_of(nouns=["dog"], deleted=True)) == sorted(a_dog(divided))
        names = ["boat", "dog", "tree"]
        texts = built.noun_embeddings[[0, 2, 4]]
        found, expected = (one.prototypes(names, text_embeddings=texts) for one in (a, b))
        np.testing.assert_allclose(
            found.vectors_nkd[[0, 2]], expected.vectors_nkd[[0, 2]], atol=1e-6
        )
        assert found.support == expected.support and found.support[1].source != "own"
        with pytest.raises(ValueError, match="or they are deleted"):
            a.rows(divided.ids[gone[:1]])
    with ReferenceCollection.open(f"{changed}/partitions/00001") as alone:
        assert len(alone) == 0
    store.untombstone(changed, divided.ids[gone].tolist())
    with ReferenceCollection.open(changed) as a:
        assert len(a) == len(built.noun_of)


def a_dog(divided):
    return divided.ids[divided.built.noun_of == divided.built.nouns.index("dog")]


def test_a_deletion_of_unknown_references_changes_nothing(divided, changed):
    for bad in (FIRST + 25, 3 * FIRST, -1):
        with pytest.raises(ValueError, match=f"has no references .*{bad}"):
            store.tombstone(changed, [0, FIRST, bad], "x")
        with pytest.raises(ValueError, match="are not deleted"):
            store.untombstone(changed, [bad])
    assert store.read_tombstones(changed) == {"id": [], "reason": []}
    with ReferenceCollection.open(changed) as collection:
        for bad in (FIRST + 25, 3 * FIRST, -1):
            with pytest.raises(ValueError, match="has no references"):
                collection.rows([bad])


def test_one_partition(built, published, tmp_path):
    divided = Divided(built, [built.nouns], tmp_path / "scratch", str(tmp_path / "one"))
    with ReferenceCollection.open(divided.url) as a, ReferenceCollection.open(published) as b:
        assert_searches_equally(divided, a, b)
        found, expected = a.prototypes(built.nouns), b.prototypes(built.nouns)
        assert found.nouns == expected.nouns
        np.testing.assert_array_equal(found.vectors_nkd, expected.vectors_nkd)


def test_a_partition_opens_alone(divided):
    with ReferenceCollection.open(f"{divided.url}/partitions/00002") as alone:
        assert alone.nouns == ["lion", "tree"] and len(alone) == 23


def test_what_is_damaged_is_named(divided, changed, tmp_path):
    path = f"{changed}/partitions/00001"
    cases = {
        "is missing": lambda: shutil.rmtree(path),
        "it is truncated": lambda: os.truncate(f"{path}/visual.f16.npy", 99),
        "is not the partition": lambda: shutil.copytree(
            f"{changed}/partitions/00002", path, dirs_exist_ok=True
        ),
    }
    for message, damage in cases.items():
        damage()
        with pytest.raises(CollectionError, match=f"{path}.*{message}"):
            ReferenceCollection.open(changed)
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(f"{divided.url}/partitions/00001", path)
    ReferenceCollection.open(changed).close()


def test_a_noun_in_two_partitions_is_refused(built, tmp_path):
    divided = Divided(built, [["boat"], ["boat", "cat"]], tmp_path / "x", str(tmp_path / "twice"))
    with pytest.raises(CollectionError, match=r"two partitions: boat"):
        ReferenceCollection.open(divided.url)


def test_publishing_checks_partitions_and_removes_what_is_no_longer_named(divided, changed, built):
    manifest = divided.manifest
    fewer = manifest.partitions[:2]
    other = (
        *fewer,
        fmt.PartitionInfo(path="partitions/00002", fingerprint="9", references=1, nouns=1),
    )
    for partitions, message in (
        (other, "is not the partition"),
        (
            (fmt.PartitionInfo(path="partitions/x", fingerprint="", references=1, nouns=1),),
            "missing",
        ),
    ):
        changes = {"partitions": partitions}
        with pytest.raises(CollectionError, match=message):
            store.publish_partitioned(changed, dataclasses.replace(manifest, **changes), files={})
    made = store.publish_partitioned(
        changed, dataclasses.replace(manifest, partitions=fewer), files={}
    )
    assert made.counts == {"references": 95, "nouns": 3, "prototypes": 12, "tombstones": 0}
    with fsspec.open(f"{changed}/{fmt.MANIFEST}") as file:
        assert json.load(file)["files"] == {}
    assert sorted(fsspec.filesystem("file").find(changed, maxdepth=1)) == [
        f"{changed}/{fmt.MANIFEST}"
    ]
    with ReferenceCollection.open(changed) as collection:
        assert collection.nouns == ["boat", "cat", "dog"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Everything of the small collection is read in place, and has several blocks."""
    monkeypatch.setattr(opening, "IN_PLACE_BYTES", 0)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1000)


@pytest.fixture
def s3(divided, s3_endpoint, small_blocks):
    """Options of `open` for the collection on an S3 server."""
    options = {"key": "t", "secret": "t", "endpoint_url": s3_endpoint}
    files = fsspec.filesystem("s3", **options)
    files.put(f"{divided.url}/", "bucket/divided/", recursive=True)
    return {"url": "s3://bucket/divided", "storage_options": options}


class Requests:
    """Counts requests of s3fs: all, and those that wait at a time."""

    def __init__(self, monkeypatch):
        import s3fs

        call, self.all, self.waiting, self.most, self.held = s3fs.S3FileSystem._call_s3, 0, 0, 0, 1

        async def counted(fs, *args, **options):
            self.all, self.waiting = self.all + 1, self.waiting + 1
            self.most = max(self.most, self.waiting)
            for _ in range(500):
                await asyncio.sleep(0.01)
                if self.most >= self.held:
                    break
            self.waiting -= 1
            return await call(fs, *args, **options)

        monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)

    def of(self, function, held=1):
        """Its answer, all its requests, and the most at a time; they are held back until `held` of
        them wait, for five seconds at most."""
        self.all, self.most, self.held = 0, 0, held
        answer = function()
        return answer, self.all, self.most


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_on_s3_partitions_are_read_in_place_and_asked_at_a_time(divided, s3, tmp_path, monkeypatch):
    """What is asked of three partitions waits together for as many requests as one at a time."""
    requests = Requests(monkeypatch)
    built = divided.built
    collection, asked, together = requests.of(
        lambda: ReferenceCollection.open(cache=tmp_path / "whole", **s3)
    )
    alone, alone_asked = [], 2  # the manifest of all partitions; its tree is not read
    for number in range(3):
        place = s3 | {
            "url": f"{s3['url']}/partitions/{number:05d}", "cache": tmp_path / f"{number}"
        }  # fmt: skip
        one, count, _ = requests.of(lambda place=place: ReferenceCollection.open(**place))
        alone.append(one)
        alone_asked += count
    assert together >= 2 and asked <= alone_asked
    assert isinstance(alone[0].visual, RemoteVectors)
    with ReferenceCollection.open(divided.url) as local:
        shutil.rmtree(tmp_path / "whole" / "blocks")  # opening has read the small files whole
        names = ["boat", "dog", "lion", "tree"]
        found, asked, together = requests.of(lambda: collection.prototypes(names), held=3)
        assert asked == together == 3
        np.testing.assert_array_equal(found.vectors_nkd, local.prototypes(names).vectors_nkd)
        assert requests.of(lambda: collection.prototypes(names))[1] == 0
        support = collection.search_text(built.textual[:5], 80)
        _, asked, together = requests.of(lambda: support.visual, held=3)
        assert asked == together == 3
        expected = local.search_text(built.textual[:5], 80)
        np.testing.assert_array_equal(support.ids, expected.ids)
        np.testing.assert_array_equal(support.visual, expected.visual)
        assert requests.of(lambda: collection.noun_embeddings, held=3)[2] >= 3
        np.testing.assert_array_equal(
            collection.prototypes(["lion"], k=3).vectors_nkd,
            local.prototypes(["lion"], k=3).vectors_nkd,
        )
        again = pickle.loads(pickle.dumps(collection))
        assert again.rows(divided.ids[:3]) == local.rows(divided.ids[:3])
    for one in (collection, again, *alone):
        one.close()
    with pytest.raises(ValueError, match="is closed"):
        collection.search_text(built.textual[:1], 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_partitioned_collection_is_changed_on_s3(divided, s3, tmp_path):
    options = s3["storage_options"]
    gone = a_dog(divided).tolist()
    store.tombstone(s3["url"], gone, "opt-out", storage_options=options)
    with ReferenceCollection.open(cache=tmp_path, copy=True, **s3) as collection:
        assert len(collection) == 93
    store.untombstone(s3["url"], gone[:5], storage_options=options)
    assert store.read_tombstones(s3["url"], storage_options=options)["id"] == gone[5:]
    fsspec.filesystem("s3", **options).rm("bucket/divided/partitions/00002/nouns.parquet")
    with pytest.raises(CollectionError, match=r"partitions/00002/nouns\.parquet is missing"):
        ReferenceCollection.open(cache=tmp_path / "new", **s3)


def test_inverted_lists_are_read_where_they_are(built, small_blocks, tmp_path):
    """Partitions share the memory for lists."""
    factory = "IVF4,SQfp16"

    class Lists(type(built)):
        def manifest(self):
            curve = (fmt.SearchPoint(k=10, nprobe=2, recall=0.9, worst_tenth=0.8),)
            info = fmt.IndexInfo(factory=factory, curve=curve)
            return dataclasses.replace(super().manifest(), visual_index=info, textual_index=info)

        def write(self, folder):
            super().write(folder)
            for name in ("visual", "textual"):
                index = indexes.build_index(getattr(self, name), factory)
                indexes.write_index(index, folder / fmt.FILES[f"{name}_index"])
            return folder

    many = Lists({"boat": 300, "cat": 200, "dog": 250, "lion": 3, "tree": 200})
    divided = Divided(many, GROUPS, tmp_path / "scratch", str(tmp_path / "collection"))
    fsspec.filesystem("memory").put(f"{divided.url}/", "/inverted/", recursive=True)
    with (
        ReferenceCollection.open("memory://inverted", cache=tmp_path / "cache") as collection,
        ReferenceCollection.open(divided.url) as local,
    ):
        inside = [part.index for part in collection._textual_index._parts]
        assert {one.list_bytes for one in inside} == {LIST_BYTES // 3}
        for k in (5, 400, 1000):
            found, expected = (
                one.search_text(many.noun_embeddings, k) for one in (collection, local)
            )
            np.testing.assert_array_equal(found.ids, expected.ids)
            np.testing.assert_array_equal(found.scores, expected.scores)
        assert (found.ids >= 0).sum(1).tolist() == [953] * 5


def by_comparing_all(parts, rows, queries, k, nprobe, deleted):
    """The k nearest references of each query in the lists that compete, in numpy, and how many
    lists are read; the last part is exact."""
    of_centroids = [
        queries @ part.index.quantizer.reconstruct_n(0, part.lists).T for part in parts[:-1]
    ]
    every, probed, last = [], [], len(parts) - 1
    for at, query in enumerate(queries):
        near = [np.argsort(-cosines[at])[:nprobe] for cosines in of_centroids]
        ends = [c[at][lists[[0, -1]]].tolist() for c, lists in zip(of_centroids, near, strict=True)]
        least = max(ends)[1]
        there = {last * fmt.PARTITION_IDS + i: own for i, own in enumerate(rows[last])}
        lists_read = 0
        for number, (part, lists) in enumerate(zip(parts[:-1], near, strict=True)):
            for one in (one for one in lists if of_centroids[number][at][one] >= least - 1e-7):
                size = part.index.invlists.list_size(int(one))
                own = faiss.rev_swig_ptr(part.index.invlists.get_ids(int(one)), size)
                there |= {number * fmt.PARTITION_IDS + int(i): rows[number][i] for i in own}
                lists_read += 1
        probed.append(lists_read)
        best = sorted((-float(v.astype(np.float32) @ query), i) for i, v in there.items()
                      if i not in deleted)[:k]  # fmt: skip
        every.append(([i for _, i in best], [-score for score, _ in best]))
    return every, probed


K, NPROBE = 5, 3
CURVE = [fmt.SearchPoint(k=K, nprobe=NPROBE, recall=0.9, worst_tenth=0.8)]


def competing(count=3, lists=8):
    """Parts, the last of which is exact, their rows, queries, and an index over their lists that
    compares all of them."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((count, 6))
    rows = [l2_normalised(c + rng.standard_normal((200, 6))).astype(np.float16) for c in centres]
    parts = [TunedIndex(indexes.build_index(own, f"IVF{lists},SQfp16"), CURVE) for own in rows]
    exact = TunedIndex(indexes.build_index(rows[0][:30]), [])
    centroids = np.concatenate([one.index.quantizer.reconstruct_n(0, lists) for one in parts])
    over = faiss.index_factory(6, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    over.train(centroids)
    over.add(centroids)
    points = [fmt.SearchPoint(k=1, nprobe=4, recall=1.0, worst_tenth=1.0)]
    queries = l2_normalised(rng.standard_normal((40, 6))).astype(np.float32)
    return [*parts, exact], [*rows, rows[0][:30]], queries, TunedIndex(over, points)


@pytest.mark.parametrize("by_index", [False, True], ids=["comparing all", "by an index"])
@pytest.mark.parametrize("deleted", [[], [3, 40, fmt.PARTITION_IDS, 2 * fmt.PARTITION_IDS + 7]])
def test_lists_of_all_partitions_compete(deleted, by_index):
    """Against the same choice of lists in numpy."""
    parts, rows, queries, lists = competing()
    joined = JoinedIndex(parts, 1, lists if by_index else None)
    scores, ids = joined.search(queries, K, np.array(deleted, np.int64))
    expected, probed = by_comparing_all(parts, rows, queries, K, NPROBE, deleted)
    for at, (wanted, of_wanted) in enumerate(expected):
        assert ids[at].tolist() == wanted
        np.testing.assert_allclose(scores[at], of_wanted, atol=1e-6)
    assert min(probed) >= NPROBE and np.mean(probed) < 2.7 * NPROBE


@pytest.mark.parametrize("by_index", [False, True], ids=["comparing all", "by an index"])
def test_more_is_read_where_lists_hold_too_few(by_index):
    """Until there are enough, or until all are found."""
    parts, rows, queries, lists = competing(count=6)
    joined = JoinedIndex(parts, 4, lists if by_index else None)
    gone = np.sort(np.concatenate([np.arange(150) + n * fmt.PARTITION_IDS for n in range(6)]))
    every = {n * fmt.PARTITION_IDS + i: v for n, own in enumerate(rows) for i, v in enumerate(own)}
    left = {i: v.astype(np.float32) for i, v in every.items() if i not in set(gone.tolist())}
    for k in (40, 329, 331, 2000):
        scores, ids = joined.search(queries[:7], k, gone)
        assert ((ids >= 0).sum(axis=1) == min(k, len(left))).all()
        for query, own, of_own in zip(queries, ids, scores, strict=False):
            found = own[own >= 0].tolist()
            assert len(set(found)) == len(found) and set(found) <= left.keys()
            np.testing.assert_allclose(
                of_own[own >= 0], [left[i] @ query for i in found], atol=1e-6
            )
    assert set(ids[0][ids[0] >= 0].tolist()) == left.keys()


@pytest.mark.parametrize("k", [K, 3 * K], ids=["some lists", "all lists"])
def test_memory_does_not_hold_all_lists_for_all_queries(k, monkeypatch):
    """20,000 queries and 96 lists are 54 MB as pairs, before they are sorted."""
    parts, _, queries, _ = competing(count=12)
    many = np.tile(queries, (500, 1))
    expected = JoinedIndex(parts[:-1], 1).search(queries, k, np.zeros(0, np.int64))
    monkeypatch.setattr(joined_index, "_AT_ONCE", 1 << 12)
    tracemalloc.start()
    try:
        found = JoinedIndex(parts[:-1], 1).search(many, k, np.zeros(0, np.int64))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(found[0], np.tile(expected[0], (500, 1)), atol=1e-6)
    np.testing.assert_array_equal(found[1], np.tile(expected[1], (500, 1)))
    assert peak < 32 << 20


def test_partitions_without_a_near_list_are_not_touched():
    parts, _, queries, lists = competing(count=12)
    asked = []

    class Watched(TunedIndex):
        def nearest_lists(self, *_):
            raise AssertionError("centroids of a partition were compared")

        def search_lists(self, *arguments):
            asked.append(self)
            return super().search_lists(*arguments)

    watched = [Watched(part.index, part.curve) for part in parts]
    joined = JoinedIndex(watched, 1, lists)
    for query in queries:
        asked.clear()
        found = joined.search(query[None], K, np.zeros(0, np.int64))
        assert 1 <= len(asked) < 12
        expected = JoinedIndex(parts, 1).search(query[None], K, np.zeros(0, np.int64))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_on_the_hub(divided, small_blocks, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    paths = [path for path in Path(divided.url).rglob("*") if path.is_file()]
    tree = {f"x/{path.relative_to(divided.url)}": path.read_bytes() for path in paths}
    hub.repositories["me/them"] = [("a" * 40, tree)]
    with (
        ReferenceCollection.open("hf://me/them/x", cache=tmp_path) as collection,
        ReferenceCollection.open(divided.url) as local,
    ):
        found, expected = (
            one.search_regions(divided.built.visual[:5], 60) for one in (collection, local)
        )
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.visual, expected.visual)
    hub.close()
