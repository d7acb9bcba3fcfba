"""Publishing and fetching, on a local disk and on an object store."""

import json
import os
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ovref_inference import CollectionError, ReferenceCollection
from ovref_inference.collection import file_cache, store
from ovref_inference.collection import format as fmt
from ovref_inference.collection import index as indexes


@pytest.fixture
def remote(built, tmp_path):
    """A collection in memory, as on an object store: url and its file system."""
    url = f"memory://{tmp_path.name}/collection"
    built.publish(tmp_path / "scratch", url)
    yield url
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_publishing_twice_gives_equal_bytes(built, tmp_path):
    for name in ("one", "two"):
        built.publish(tmp_path / f"scratch-{name}", str(tmp_path / name))
    for name in (*fmt.FILES.values(), fmt.MANIFEST):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert names(tmp_path / "one") == {*fmt.FILES.values(), fmt.MANIFEST}


def test_publishing_in_place(built, tmp_path):
    folder = built.write(tmp_path / "here")
    manifest = store.publish(folder, str(folder), built.manifest())
    assert manifest.counts["references"] == len(built.visual)
    with ReferenceCollection.open(folder, verify="full") as collection:
        assert len(collection) == len(built.visual)


def test_growing_keeps_the_old_version_readable_and_ids_stable(built, published, tmp_path):
    class Grown(type(built)):
        """The same references with 6 more of the first noun."""

        def __init__(self):
            self.__dict__.update(built.__dict__)
            self.noun_of = np.concatenate([built.noun_of, np.zeros(6, dtype=int)])
            self.visual = np.concatenate([built.visual, built.visual[:6]])
            self.textual = np.concatenate([built.textual, built.textual[:6]])
            self.counts = np.bincount(self.noun_of)

    with ReferenceCollection.open(published) as old:
        before = old.search_regions(built.visual[:4], k=3)
        manifest = Grown().publish(tmp_path / "grown", str(published))
        again = old.search_regions(built.visual[:4], k=3)
        np.testing.assert_array_equal(before.ids, again.ids)
        np.testing.assert_array_equal(before.visual, again.visual)
    # Prototypes had not changed, so their file was left alone; nothing is left over.
    assert manifest.files["prototypes"].path == fmt.FILES["prototypes"]
    assert manifest.files["visual"].path != fmt.FILES["visual"]
    assert names(published) == {fmt.MANIFEST, *(f.path for f in manifest.files.values())}
    with ReferenceCollection.open(published, verify="full") as new:
        assert len(new) == len(built.visual) + 6
        assert new.rows([5])[0]["key"] == built.references()["key"][5]


def test_a_cut_off_publication_leaves_the_old_version(built, published, tmp_path, monkeypatch):
    folder = built.write(tmp_path / "next")
    fmt.write_vectors(folder / fmt.FILES["visual"], -built.visual)
    indexes.write_index(indexes.build_index(-built.visual), folder / fmt.FILES["visual_index"])
    put = store._put

    def fail_on_manifest(fs, path, target):
        if target.endswith(fmt.MANIFEST):
            raise OSError("no space left")
        put(fs, path, target)

    monkeypatch.setattr(store, "_put", fail_on_manifest)
    with pytest.raises(OSError, match="no space"):
        store.publish(folder, str(published), built.manifest())
    with ReferenceCollection.open(published, verify="full") as collection:
        np.testing.assert_array_equal(collection.visual, built.visual)


def test_a_damaged_manifest_is_mended_by_publishing_again(built, published, tmp_path):
    (published / fmt.MANIFEST).write_text("{")
    built.publish(tmp_path / "again", str(published))
    ReferenceCollection.open(published, verify="full").close()


@pytest.mark.parametrize("name", sorted(fmt.FILES.values()))
def test_publishing_needs_every_file(built, tmp_path, name):
    folder = built.write(tmp_path / "scratch")
    (folder / name).unlink()
    with pytest.raises(CollectionError, match=f"{name} is missing"):
        store.publish(folder, str(tmp_path / "target"), built.manifest())
    assert not (tmp_path / "target").exists()


def test_publishing_files_that_disagree_is_refused(built, tmp_path):
    folder = built.write(tmp_path / "scratch")
    fmt.write_vectors(folder / fmt.FILES["textual"], built.textual[:-1])
    with pytest.raises(CollectionError, match="not belong to one collection"):
        store.publish(folder, str(tmp_path / "target"), built.manifest())
    built.write(folder)
    indexes.write_index(indexes.build_index(built.visual[:-1]), folder / fmt.FILES["visual_index"])
    with pytest.raises(CollectionError, match="the index"):
        store.publish(folder, str(tmp_path / "target"), built.manifest())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noun": ["cat", "boat", "dog", "lion", "tree"]}, "not sorted"),
        ({"noun": ["boat", "cat", "cat", "lion", "tree"]}, "each once"),
        ({"count": [1, 1, 1, 1, 1]}, "counts do not add up to 118 references"),
        ({"prototype_stop": [4, 8, 12, 16, 19]}, "do not tile 20 prototypes"),
        ({"prototype_start": [0, 4, 8, 12, 15]}, "do not tile"),
        ({"embedding": [[1.0]] * 5}, "not 12 wide"),
        ({"embedding": [[1.0]] * 4 + [[1.0] * 3]}, "not 12 wide"),
        ({"neighbours": [["wolf"]] + [[]] * 4}, "neighbours are not in the vocabulary"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(built, tmp_path, change, message):
    folder = built.write(tmp_path / "scratch")
    path = folder / fmt.FILES["nouns"]
    with fmt.open_table(path, fmt.NOUN_SCHEMA) as table:
        columns = table.read().to_pydict()
    fmt.write_table(path, fmt.NOUN_SCHEMA, columns | change)
    with pytest.raises(CollectionError, match=rf"nouns\.parquet.*{message}"):
        store.publish(folder, str(tmp_path / "target"), built.manifest())


def test_ids_must_be_row_numbers(built, tmp_path, monkeypatch):
    monkeypatch.setattr(fmt, "ROW_GROUP", 16)
    folder = built.write(tmp_path / "scratch")
    store.publish(folder, str(tmp_path / "good"), built.manifest())
    columns = built.references()
    columns["id"][40:42] = [41, 41]
    columns["id"][47] = 48
    fmt.write_table(folder / fmt.FILES["references"], fmt.REFERENCE_SCHEMA, columns)
    with pytest.raises(CollectionError, match=r"references\.parquet: row 32"):
        store.publish(folder, str(tmp_path / "target"), built.manifest())


def test_publishing_nothing_is_refused(built, tmp_path):
    folder = built.write(tmp_path / "scratch")
    for role, dim in (("visual", 16), ("textual", 12)):
        fmt.write_vectors(folder / fmt.FILES[role], np.zeros((0, dim)))
    for role, schema in (("references", fmt.REFERENCE_SCHEMA), ("nouns", fmt.NOUN_SCHEMA)):
        fmt.write_table(folder / fmt.FILES[role], schema, {name: [] for name in schema.names})
    fmt.write_vectors(folder / fmt.FILES["prototypes"], np.zeros((0, 16)))
    with pytest.raises(CollectionError, match="no reference"):
        store.publish(folder, str(tmp_path / "target"), built.manifest())


def test_a_remote_collection_is_copied_once(built, remote, tmp_path):
    cache = tmp_path / "cache"
    with ReferenceCollection.open(remote, cache=cache) as collection:
        first = collection.search_text(built.noun_embeddings, k=4)
    copied = names(cache)
    assert len(copied) == len(fmt.FILES)
    times = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    with ReferenceCollection.open(remote, cache=cache, verify="full") as collection:
        second = collection.search_text(built.noun_embeddings, k=4)
        np.testing.assert_array_equal(first.ids, second.ids)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == times
    store.tombstone(remote, [0], "opt-out")
    ReferenceCollection.open(remote, cache=cache).close()
    assert len(names(cache) - copied) == 1


def test_a_damaged_cache_is_copied_again(remote, built, tmp_path):
    cache = tmp_path / "cache"
    ReferenceCollection.open(remote, cache=cache).close()
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    with ReferenceCollection.open(remote, cache=cache, verify="full") as collection:
        np.testing.assert_array_equal(collection.visual, built.visual)


def test_a_damaged_remote_file_is_named_and_not_cached(remote, tmp_path):
    fs, root = fsspec.core.url_to_fs(remote)
    for content, message in ((b"\0" * 10, "10 bytes"), (None, "is missing")):
        if content is None:
            fs.rm_file(f"{root}/nouns.parquet")
        else:
            fs.pipe_file(f"{root}/nouns.parquet", content)
        with pytest.raises(CollectionError, match=rf"nouns\.parquet.*{message}"):
            ReferenceCollection.open(remote, cache=tmp_path / "cache")
        assert not [name for name in names(tmp_path / "cache") if "nouns" in name or "tmp" in name]


def test_a_missing_remote_collection(tmp_path):
    with pytest.raises(CollectionError, match=r"collection\.json is missing"):
        ReferenceCollection.open("memory://nowhere-at-all", cache=tmp_path)


def test_verify_takes_two_words(published):
    with pytest.raises(ValueError, match="quick"):
        ReferenceCollection.open(published, verify="none")


def test_tombstones_of_unknown_ids_are_refused(published, built):
    for bad in (-1, len(built.visual)):
        with pytest.raises(ValueError, match="has references 0 to"):
            store.tombstone(str(published), [0, bad], "x")
    assert ReferenceCollection.open(published)._deleted.tolist() == []


def test_full_verification_finds_what_quick_cannot(built, published, monkeypatch):
    path = published / fmt.FILES["visual"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(file_cache, "SMALL_BYTES", 0)
    ReferenceCollection.open(published).close()
    with pytest.raises(CollectionError, match=r"visual\.f16\.npy.*checksum"):
        ReferenceCollection.open(published, verify="full")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("OVREF_CACHE", str(tmp_path))
    assert file_cache.cache_folder() == tmp_path
    monkeypatch.delenv("OVREF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    for platform, end in (("linux", "/x/ovref"), ("darwin", "Library/Caches/ovref")):
        monkeypatch.setattr("sys.platform", platform)
        assert file_cache.cache_folder().as_posix().endswith(end)
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert file_cache.cache_folder().as_posix() == "/local/ovref/cache"


@pytest.fixture(scope="module")
def s3(s3_endpoint):
    """Storage options for the S3 server of the tests."""
    options = {
        "key": "test",
        "secret": "test",
        "endpoint_url": s3_endpoint,
        "skip_instance_cache": True,
    }
    return options


# botocore and moto warn about their own use of dates and of unclosed sockets.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_s3_round_trip(built, s3, tmp_path):
    folder, url = built.write(tmp_path / "scratch"), "s3://bucket/some/collection"
    store.publish(folder, url, built.manifest(), storage_options=s3)
    cache = tmp_path / "cache"
    with ReferenceCollection.open(url, cache=cache, storage_options=s3) as collection:
        found = collection.prototypes(["dog"])
        row = built.nouns.index("dog")
        np.testing.assert_array_equal(found.vectors_nkd[0], built.prototypes[row][0])
    store.tombstone(url, [1, 2], "opt-out", storage_options=s3)
    with ReferenceCollection.open(url, cache=cache, storage_options=s3) as collection:
        assert len(collection) == len(built.visual) - 2
    fs = fsspec.filesystem("s3", **s3)
    manifest = json.loads(fs.cat_file("bucket/some/collection/collection.json"))
    there = {Path(path).name for path in fs.ls("bucket/some/collection", refresh=True)}
    assert there == {fmt.MANIFEST, *(info["path"] for info in manifest["files"].values())}
    fs.rm_file("bucket/some/collection/visual.f16.npy")
    shutil.rmtree(cache)
    with pytest.raises(CollectionError, match=r"visual\.f16\.npy is missing"):
        ReferenceCollection.open(url, cache=cache, storage_options=s3)
    with pytest.raises(CollectionError, match=r"collection\.json is missing"):
        ReferenceCollection.open("s3://bucket/none", cache=cache, storage_options=s3)


def test_credentials_and_networks_that_are_missing_are_said(s3, monkeypatch):
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    nobody = {"endpoint_url": s3["endpoint_url"], "skip_instance_cache": True}
    with pytest.raises(CollectionError, match="AWS_ACCESS_KEY_ID"):
        store.read_manifest("s3://bucket/some/collection", storage_options=nobody)
    nowhere = s3 | {
        "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1},
    }
    with pytest.raises(CollectionError, match=r"cannot read .*127\.0\.0\.1:9"):
        store.read_manifest("s3://bucket/some/collection", storage_options=nowhere)


def test_a_deletion_is_taken_back_and_what_is_settled_stays_counted(remote):
    def living():
        with ReferenceCollection.open(remote) as collection:
            return len(collection), collection.manifest.settled_tombstones

    total, _ = living()
    manifest = store.tombstone(remote, [4, 2], "blurred")
    store.tombstone(remote, [1], "opt-out")
    settled = fsspec.filesystem("memory").cat(f"{remote}/{fmt.MANIFEST}")
    tree = json.loads(settled) | {"settled_tombstones": 2}
    fsspec.filesystem("memory").pipe(f"{remote}/{fmt.MANIFEST}", json.dumps(tree).encode())
    assert manifest.counts["tombstones"] == 2 and living() == (total - 3, 2)
    assert store.read_tombstones(remote) == {
        "id": [2, 4, 1], "reason": ["blurred", "blurred", "opt-out"],
    }  # fmt: skip
    store.untombstone(remote, [2, 1])
    assert living() == (total - 1, 1)
    with pytest.raises(ValueError, match=r"references \[2\] are not deleted"):
        store.untombstone(remote, [2, 4])
    store.untombstone(remote, [4])
    assert living() == (total, 0)
