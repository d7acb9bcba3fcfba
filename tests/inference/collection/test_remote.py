"""Collections on an object store that are read by ranges."""

import dataclasses
import http.server
import io
import itertools
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from hub_server import Hub
from ovref_inference import CollectionError, ReferenceCollection
from ovref_inference.collection import format as fmt
from ovref_inference.collection import index as indexes
from ovref_inference.collection import opening, remote, store
from ovref_inference.collection.exact import faiss_module
from ovref_inference.collection.remote import BlockCache, Layout, RemoteFile, RemoteVectors
from ovref_inference.collection.remote_index import RemoteIndex

COUNTS = {"boat": 400, "cat": 300, "dog": 250, "lion": 3, "tree": 200}
FACTORY = "IVF16,SQfp16"


def with_lists(kind):
    """A collection of this kind whose indexes have inverted lists."""

    class Large(kind):
        def manifest(self):
            curve = (fmt.SearchPoint(k=10, nprobe=3, recall=0.9, worst_tenth=0.8),)
            info = fmt.IndexInfo(factory=FACTORY, curve=curve)
            return dataclasses.replace(super().manifest(), visual_index=info, textual_index=info)

        def write(self, folder):
            super().write(folder)
            for name in ("visual", "textual"):
                index = indexes.build_index(getattr(self, name), FACTORY)
                indexes.write_index(index, folder / fmt.FILES[f"{name}_index"])
            return folder

    return Large(COUNTS)


@pytest.fixture(scope="module")
def large(built, tmp_path_factory):
    """What is in the collection, and its local folder."""
    many, folder = with_lists(type(built)), tmp_path_factory.mktemp("large")
    many.publish(folder / "scratch", str(folder / "collection"))
    return many, folder / "collection"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Everything of the small collection is read in place, and has several blocks."""
    monkeypatch.setattr(opening, "IN_PLACE_BYTES", 0)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1000)


@pytest.fixture
def s3(large, s3_endpoint):
    """Options of `open` for the collection on an S3 server."""
    options = {"key": "t", "secret": "t", "endpoint_url": s3_endpoint, "skip_instance_cache": True}
    files = fsspec.filesystem("s3", **options)
    files.put(f"{large[1]}/", "bucket/large/", recursive=True)
    return {"url": "s3://bucket/large", "storage_options": options}


def answers(collection, built):
    """Whatever can be asked."""
    rng = np.random.default_rng(1)
    regions = rng.standard_normal((7, built.visual.shape[1]))
    texts = np.concatenate([built.noun_embeddings, rng.standard_normal((2, 12))])
    by_region = collection.search_regions(regions, k=10)
    by_text = collection.search_text(texts, k=400)
    stored = collection.prototypes(["cat", "lion", "tree"], text_embeddings=texts[:3])
    made = collection.prototypes(["dog", "lion"], k=3, text_embeddings=texts[:2])
    retrieved = collection.fossil_prototypes(texts, n=30, k=4)
    return {
        "region ids": by_region.ids, "region scores": by_region.scores,
        "region vectors": by_region.visual, "region texts": by_region.textual,
        "text ids": by_text.ids, "text scores": by_text.scores, "text nouns": by_text.noun_rows,
        "stored": stored.vectors_nkd, "made": made.vectors_nkd, "retrieved": retrieved.vectors_nkd,
        "rows": collection.rows([1100, 3, 3]), "dogs": collection.references_of("dog"),
        "counts": collection.noun_counts, "by key": collection.ids_of(keys=[f"{5:024x}"]),
        "table": collection.to_table().to_pydict(), "slice": collection.visual[5:9],
        "row": collection.visual[-1], "step": collection.textual[::100],
    }  # fmt: skip


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_collection_on_s3_answers_as_a_local_one(large, s3, tmp_path):
    built, folder = large
    with ReferenceCollection.open(folder) as local:
        expected = answers(local, built)
    with ReferenceCollection.open(cache=tmp_path, **s3) as collection:
        assert isinstance(collection.visual, RemoteVectors)
        assert_equal(answers(collection, built), expected)
        again = pickle.loads(pickle.dumps(collection))
        np.testing.assert_array_equal(again.visual[:3], built.visual[:3])
        again.close()
    # Only the tombstones were copied; the rest is there in blocks.
    assert [path.suffix for path in tmp_path.iterdir() if path.is_file()] == [".parquet"]
    with ReferenceCollection.open(cache=tmp_path / "all", copy=True, **s3) as copied:
        assert isinstance(copied.visual, np.memmap)
        assert_equal(answers(copied, built), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_deleted_references_are_left_out(large, s3, tmp_path):
    built, _ = large
    store.tombstone(s3["url"], list(range(300)), "opt-out", storage_options=s3["storage_options"])
    with ReferenceCollection.open(cache=tmp_path, **s3) as collection:
        found = collection.search_text(built.noun_embeddings, k=1200)
        assert found.ids[found.ids >= 0].min() == 300
        assert ((found.ids >= 0).sum(1) == 853).all()
        assert collection.noun_counts.sum() == 853


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_collection_on_the_hub_answers_as_a_local_one(large, tmp_path, monkeypatch):
    built, folder = large
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    tree = {f"things/{path.name}": path.read_bytes() for path in folder.iterdir()}
    hub.repositories["me/them"] = [("a" * 40, tree)]
    cache = tmp_path / "hub"
    with ReferenceCollection.open("hf://me/them/things", cache=cache) as collection:
        # What is pushed meanwhile is another commit.
        changed = {name: data[::-1] for name, data in tree.items()}
        hub.repositories["me/them"].append(("b" * 40, changed))
        assert isinstance(collection.visual, RemoteVectors)
        with ReferenceCollection.open(folder) as local:
            assert_equal(answers(collection, built), answers(local, built))
    hub.close()


class Counting(MemoryFileSystem):
    """Counts ranges that are asked for."""

    store, pseudo_dirs = {}, [""]
    asked = 0

    def cat_file(self, path, start=None, end=None, **options):
        type(self).asked += start is not None
        return super().cat_file(path, start, end, **options)


@pytest.fixture
def file(tmp_path):
    """A file of 10,500 bytes and its content."""
    content = np.random.default_rng(0).integers(256, size=10_500, dtype=np.uint8)
    files = Counting(skip_instance_cache=True)
    files.pipe_file("/numbers", content.tobytes())
    Counting.asked = 0
    cache = BlockCache(tmp_path / "blocks", limit=1 << 20)
    return RemoteFile(files, "/numbers", len(content), "hash", cache), content


def test_ranges_in_any_order_overlapping_and_empty(file):
    found, content = file
    starts, lengths = [9_990, 0, 2_500, 2_400, 77, 10_499, 0], [20, 1, 3_000, 200, 0, 1, 10_500]
    expected = [content[s : s + n] for s, n in zip(starts, lengths, strict=True)]
    np.testing.assert_array_equal(found.read(starts, lengths), np.concatenate(expected))
    assert found.read([], []).shape == (0,)


def test_a_block_is_asked_for_once_and_neighbours_together(file):
    found, _ = file
    found.read([10, 2_100], [5, 1_500])
    assert Counting.asked == 2  # block 0, and blocks 2 and 3
    found.read([20, 900, 3_000], [5, 100, 10])
    assert Counting.asked == 2
    found.prefetch([0], [10_500])
    assert Counting.asked == 4  # block 1, and blocks 4 to 10
    assert len(found.read([0], [10_500])) == 10_500
    assert Counting.asked == 4


def test_the_file_object_reads_and_seeks_as_others_do(file):
    found, content = file
    with found.open() as stream:
        expected = io.BytesIO(content.tobytes())
        for seek, size in ((0, 10), (9_000, 5_000), (5, 0), (10_500, 4), (20_000, 4), (999, 2)):
            assert stream.seek(seek) == expected.seek(seek)
            assert stream.read(size) == expected.read(size)
        assert stream.seek(-10, io.SEEK_END) == 10_490
        assert stream.read() == content[-10:].tobytes()
        assert stream.seek(-5, io.SEEK_CUR) == 10_495


def test_a_block_that_was_cut_off_or_deleted_is_read_again(file):
    found, content = file
    found.read([0], [10_500])
    path = found.cache.folder / "hash" / f"{4:08d}"
    path.write_bytes(b"cut")
    (path.parent / f"{5:08d}").unlink()
    np.testing.assert_array_equal(found.read([0], [10_500]), content)
    assert Counting.asked == 2
    assert len(path.read_bytes()) == 1000


def test_the_cache_keeps_to_its_limit_and_drops_what_was_used_least_recently(tmp_path):
    cache = BlockCache(tmp_path, limit=100_000)
    for block in range(100):
        cache.write("a", block, bytes(1000))
    times = iter(range(10**9, 2 * 10**9))
    for path in sorted((tmp_path / "a").iterdir()):
        now = next(times)
        os.utime(path, (now, now))
    with cache.open("a", 0, 1000) as block:  # used just now
        assert block.read() == bytes(1000)
    for block in range(5):
        cache.write("b", block, bytes(1000))
        kept = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        assert kept <= 101_000
    assert [cache.has("a", block, 1000) for block in (0, 1, 99)] == [True, False, True]
    assert cache.open("a", 1, 1000) is None


def test_blocks_that_do_not_fit_into_the_cache_are_read_all_the_same(file):
    found, content = file
    found.cache.limit = 2_000
    np.testing.assert_array_equal(found.read([0], [10_500]), content)
    assert sum(path.stat().st_size for path in found.cache.folder.rglob("*")) < 10_000


def test_several_threads_share_a_file(file):
    found, content = file
    failures = []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            start = int(rng.integers(10_000))
            if not np.array_equal(found.read([start], [500]), content[start : start + 500]):
                failures.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_rows_of_vectors(tmp_path, file):
    rows = np.random.default_rng(0).standard_normal((300, 7)).astype(np.float16)
    fmt.write_vectors(tmp_path / "rows.npy", rows)
    files, content = file[0].fs, (tmp_path / "rows.npy").read_bytes()
    files.pipe_file("/rows", content)
    vectors = RemoteVectors(RemoteFile(files, "/rows", len(content), "rows", file[0].cache))
    assert (vectors.shape, vectors.dtype, len(vectors)) == ((300, 7), np.float16, 300)
    for key in (
        3, -1, slice(None), slice(10, 20), slice(20, 10), slice(None, None, -7), [5, 5, 299],
        np.zeros((0,), int), np.array([[1, 2], [-3, 4]]), np.arange(300) % 3 == 0,
    ):  # fmt: skip
        np.testing.assert_array_equal(vectors[key], rows[key])
    with pytest.raises(IndexError, match="of 300"):
        vectors[[0, 300]]
    short = RemoteFile(files, "/rows", len(content) - 2, "short", file[0].cache)
    with pytest.raises(CollectionError, match="truncated"):
        RemoteVectors(short)


def test_the_header_of_a_matrix_of_the_expected_size_is_not_read(tmp_path, file):
    rows = np.random.default_rng(0).standard_normal((300, 7)).astype(np.float16)
    fmt.write_vectors(tmp_path / "rows.npy", rows)
    files, content = file[0].fs, (tmp_path / "rows.npy").read_bytes()
    files.pipe_file("/rows", content)
    Counting.asked = 0
    for name, shape, dtype, asked in (
        ("same", (300, 7), "<f2", 0), ("wider", (300, 8), "<f2", 1), ("int8", (300, 7), "i1", 1),
    ):  # fmt: skip
        remote_file = RemoteFile(files, "/rows", len(content), name, file[0].cache)
        vectors = RemoteVectors(remote_file, Layout(shape, np.dtype(dtype)))
        assert Counting.asked == asked
        assert (vectors.shape, vectors.dtype) == ((300, 7), np.float16)
        np.testing.assert_array_equal(vectors[[299, 0, 5]], rows[[299, 0, 5]])
        Counting.asked = 0


def test_references_are_checked_when_they_are_first_read(large, tmp_path):
    built, folder = large
    files = fsspec.filesystem("memory")
    files.put(f"{folder}/", "/swapped/", recursive=True)
    manifest = fmt.parse_manifest(files.cat_file("/swapped/collection.json"), "x")
    table = fmt.open_table(folder / "references.parquet", fmt.REFERENCE_SCHEMA).read()
    for name, changed, message in (
        ("fewer", table.slice(0, 1000), "has 1000 rows, the collection 1153 references"),
        ("moved", table.set_column(0, "id", [table.column(0).to_numpy() + 1]), "row numbers as id"),
    ):
        fmt.write_table(tmp_path / "x", fmt.REFERENCE_SCHEMA, changed.to_pydict())
        content = (tmp_path / "x").read_bytes()
        files.pipe_file("/swapped/references.parquet", content)
        info = fmt.FileInfo(path="references.parquet", bytes=len(content), sha256=name)
        other = dataclasses.replace(manifest, files=manifest.files | {"references": info})
        files.pipe_file("/swapped/collection.json", fmt.manifest_bytes(other))
        with ReferenceCollection.open("memory://swapped", cache=tmp_path / "cache") as collection:
            collection.search_text(built.noun_embeddings, k=3)
            with pytest.raises(CollectionError, match=message):
                collection.rows([3])
    files.rm("/swapped", recursive=True)


def test_what_cannot_be_read_is_said(file):
    found, _ = file
    missing = RemoteFile(found.fs, "/nothing", 100, "none", found.cache)
    with pytest.raises(CollectionError, match="/nothing is missing; open the collection again"):
        missing.read([0], [10])
    longer = RemoteFile(found.fs, "/numbers", 20_000, "longer", found.cache)
    with pytest.raises(CollectionError, match="gave 500 bytes where 1000 were asked for"):
        longer.read([10_000], [10])


@pytest.fixture
def plain_server(large):
    """A web server that serves whole files only."""
    folder = large[1]

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_server_without_ranges_needs_a_copy(large, plain_server, tmp_path):
    with (
        pytest.raises(CollectionError, match=r"does not serve ranges.*copy=True"),
        ReferenceCollection.open(plain_server, cache=tmp_path) as collection,
    ):
        collection.search_text(large[0].noun_embeddings, k=3)
    with ReferenceCollection.open(plain_server, cache=tmp_path, copy=True) as collection:
        assert len(collection) == len(large[0].visual)


def test_a_file_that_is_no_such_index_is_refused(large, tmp_path):
    built, folder = large
    files = fsspec.filesystem("memory")
    files.put(f"{folder}/", "/other/", recursive=True)
    manifest = fmt.parse_manifest(files.cat_file("/other/collection.json"), "x")
    path = f"/other/{manifest.files['textual_index'].path}"
    content = files.cat_file(path)
    files.pipe_file(path, b"x" * len(content))
    with (
        ReferenceCollection.open("memory://other", cache=tmp_path) as collection,
        pytest.raises(CollectionError, match="cannot read the index"),
    ):
        collection.search_text(built.noun_embeddings, k=3)
    files.rm("/other", recursive=True)


def test_searches_of_several_threads_some_of_which_fail(large, tmp_path, monkeypatch):
    """Lists are in memory only while they are searched; a search that fails leaves none behind."""
    built, folder = large
    path = folder / fmt.FILES["textual_index"]
    fs = MemoryFileSystem()
    fs.pipe_file("/one_index", path.read_bytes())
    file = RemoteFile(fs, "/one_index", path.stat().st_size, "0" * 64, BlockCache(tmp_path))
    rows, dim = built.textual.shape
    index = RemoteIndex(file, rows, dim, FACTORY)
    index.list_bytes = 1  # each list by itself
    params = faiss_module().SearchParametersIVF(nprobe=3)
    local = indexes.read_index(path, rows=rows, dim=dim)
    wanted = local.search(built.noun_embeddings, 7, params=params)

    def search(_):
        try:
            return index.search(built.noun_embeddings, 7, params=params)
        except CollectionError:
            return None

    np.testing.assert_array_equal(search(0), wanted)
    read, calls = file.read, itertools.count()
    lists = len(np.unique(local.quantizer.search(built.noun_embeddings, 3)[1]))

    def unreliable(*args, **options):
        if next(calls) % (2 * lists + 1) == 2 * lists:
            raise CollectionError("gone")
        return read(*args, **options)

    monkeypatch.setattr(file, "read", unreliable)
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(search, range(12)))
    answered = [one for one in answers if one is not None]
    assert 0 < len(answered) < 12
    for one in answered:
        np.testing.assert_array_equal(one, wanted)


def test_what_is_read_in_small_parts_costs_few_bytes(tmp_path):
    """Blocks of one file may be smaller than those of another; both read the same."""
    content = np.random.default_rng(0).integers(0, 256, 40_000, dtype=np.uint8)
    fs = MemoryFileSystem()
    fs.pipe_file("/small_parts", content.tobytes())
    starts = np.array([35_000, 100, 7_990])
    for block_bytes, most in ((None, 4000), (100, 500)):
        cache = BlockCache(tmp_path / str(block_bytes))
        file = RemoteFile(fs, "/small_parts", len(content), "0" * 64, cache, block_bytes)
        found = file.read(starts, np.full(3, 60))
        wanted = np.concatenate([content[start : start + 60] for start in starts])
        np.testing.assert_array_equal(found, wanted)
        blocks = [path for path in cache.folder.rglob("*") if path.is_file()]
        assert 180 <= sum(path.stat().st_size for path in blocks) <= most


def test_small_blocks_stay_in_memory_within_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_MEMORY_BYTES", 500)
    content = np.random.default_rng(0).integers(0, 256, 1_050, dtype=np.uint8)
    fs = Counting(skip_instance_cache=True)
    fs.pipe_file("/small", content.tobytes())
    Counting.asked = 0
    cache = BlockCache(tmp_path / "blocks")
    file = RemoteFile(fs, "/small", len(content), "a", cache, 100)
    others = RemoteFile(fs, "/small", len(content), "b", cache)

    def held():
        return [block for _, block in cache._held]

    np.testing.assert_array_equal(others.read([0], [1_050]), content)
    assert held() == []  # of large blocks none
    wanted = np.r_[content[250:550], content[720:730]]
    np.testing.assert_array_equal(file.read([250, 720], [300, 10]), wanted)
    assert held() == [2, 3, 4, 5, 7] and Counting.asked == 3
    shutil.rmtree(cache.folder)
    np.testing.assert_array_equal(file.read([299], [2]), content[299:301])
    assert held() == [4, 5, 7, 2, 3] and Counting.asked == 3
    np.testing.assert_array_equal(file.read([1_000], [50]), content[1_000:])
    assert held() == [5, 7, 2, 3, 10] and cache._held_bytes == 450
