import errno
import os
import pickle
import subprocess
import threading

import fsspec
import pytest
from botocore.exceptions import ClientError
from fsspec.implementations.memory import MemoryFileSystem

from ovref.errors import StorageError
from ovref.storage.file_store import Store, check_conditional_create


def test_objects_are_written_replaced_listed_and_deleted(store):
    assert store.list() == []
    store.write("b/two", b"2")
    store.write("a", b"1")
    store.write("b/c/three", b"3")
    store.write("a", b"one")
    assert store.read("a") == b"one"
    assert store.list() == ["a", "b/c/three", "b/two"]
    assert store.list("b") == ["b/c/three", "b/two"]
    assert store.list("absent") == []
    assert store.exists("b/two") and not store.exists("b/four")
    assert store.read_if_there("b/two") == b"2" and store.read_if_there("x/four") is None
    store.delete("b/two")
    store.delete("b/two")
    assert store.list() == ["a", "b/c/three"]


def test_many_objects_are_read_at_once(store):
    for name in "abc":
        store.write(f"x/{name}", name.encode())
    assert store.read_many(["x/c", "x/a"]) == {"x/c": b"c", "x/a": b"a"}
    assert store.read_many(["x/b"]) == {"x/b": b"b"}
    assert store.read_many([]) == {}
    with pytest.raises(StorageError, match="deleted or never written"):
        store.read_many(["x/a", "x/absent"])


@pytest.mark.parametrize("name", ["a[1]", "a*b?", "per%20cent", "hash#1", "{a,b}", "two words"])
def test_a_place_may_have_any_name(store, name, tmp_path):
    """None is taken for a pattern."""
    place = store.child(name)
    local = tmp_path / "file"
    local.write_bytes(b"1")
    place.upload(local, "x/a")
    assert place.create("x/b", b"2") and place.exists("x/b")
    assert place.read_many(["x/a", "x/b"]) == {"x/a": b"1", "x/b": b"2"}
    assert place.list("x") == list(place.details("x")) == ["x/a", "x/b"]
    with place.local_copy("x/a") as path:
        assert path.read_bytes() == place.read("x/a") == b"1"
    place.delete("x/a")
    assert place.list() == ["x/b"]


def test_a_child_is_a_store_of_its_own(store):
    store.child("step").write("a", b"1")
    assert store.list() == ["step/a"]
    assert store.child("step").list() == ["a"]


def test_a_local_file_is_uploaded_and_had_back(store, tmp_path):
    local = tmp_path / "file"
    local.write_bytes(bytes(range(256)) * 9000)
    store.upload(local, "x/file")
    with store.local_copy("x/file") as path:
        assert path.read_bytes() == local.read_bytes()
    assert store.age_s("x/file") < 3600


def test_of_two_creations_the_first_counts(store):
    assert store.create("x/marker", b"first") is True
    assert store.create("x/marker", b"second") is False
    assert store.read("x/marker") == b"first"
    check_conditional_create(store)
    assert store.list() == ["x/marker"]


def test_of_many_creations_at_once_one_counts(tmp_path):
    store = Store.open(str(tmp_path))
    for turn in range(20):
        start = threading.Barrier(4)
        won: list[int] = []

        def attempt(number, turn=turn, start=start, won=won):
            start.wait()
            if store.create(f"marker{turn}", b"%d" % number):
                won.append(number)

        threads = [threading.Thread(target=attempt, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [store.read(f"marker{turn}")] == [b"%d" % number for number in won]


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a/", ".", "a\\b", "a\0b"]
)
def test_no_path_leads_out_of_the_store(store, path):
    for call in (store.read, store.exists, store.delete, store.child):
        with pytest.raises(StorageError, match="must be relative"):
            call(path)
    with pytest.raises(StorageError, match="must be relative"):
        store.write(path, b"")
    with pytest.raises(StorageError, match="must be relative"):
        store.create(path, b"")


def test_what_is_not_there_is_named(store):
    with pytest.raises(StorageError, match=r"x/absent.*never written"):
        store.read("x/absent")
    with (
        pytest.raises(StorageError, match=r"x/absent.*never written"),
        store.local_copy("x/absent"),
    ):
        pass


def test_a_store_pickles_and_hides_its_credentials(store):
    store.write("a", b"1")
    again = pickle.loads(pickle.dumps(store))
    assert again == store and again.read("a") == b"1"
    assert "testing" not in repr(store)


def test_a_relative_folder_stays_where_it_was_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store.open("runs/one/")
    assert store.url == str(tmp_path / "runs/one")
    assert Store.open(f"file://{tmp_path}/runs/one").url == store.url


def test_an_unknown_protocol_is_refused():
    with pytest.raises(StorageError, match=r"cannot open the store nonsense://x.*s3://"):
        Store.open("nonsense://x")


def test_a_missing_bucket_is_distinguished_from_a_missing_object(s3_options):
    store = Store.open("s3://no-such-bucket/x", **s3_options)
    with pytest.raises(StorageError, match="no such bucket"):
        store.write("a", b"1")
    with pytest.raises(StorageError, match="no such bucket"):
        store.create("a", b"1")


def test_missing_credentials_are_explained(s3_options, monkeypatch):
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    store = Store.open("s3://bucket/x", endpoint_url=s3_options["endpoint_url"])
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
        store.write("a", b"1")


def test_an_unreachable_endpoint_may_be_tried_again(s3_options):
    once = {"retries": {"max_attempts": 0}, "connect_timeout": 1}
    options = {**s3_options, "endpoint_url": "http://127.0.0.1:9", "config_kwargs": once}
    with pytest.raises(ConnectionError, match=r"cannot write s3://bucket/x/a.*check the endpoint"):
        Store.open("s3://bucket/x", **options).write("a", b"1")


@pytest.mark.parametrize("write", [Store.write, Store.create], ids=["write", "create"])
@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "free space"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "read-only"),
    ],
)
def test_a_failed_write_is_explained_and_leaves_nothing(tmp_path, monkeypatch, write, code, advice):
    store = Store.open(str(tmp_path))
    store.write("a", b"old")

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    name = "a" if write is Store.write else "b"
    with pytest.raises(StorageError, match=advice):
        write(store, name, b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert store.read("a") == b"old"


def test_an_error_that_may_pass_is_not_a_storage_error(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "hiccup")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="hiccup"):
        Store.open(str(tmp_path)).write("a", b"new")


def test_a_file_in_the_way_of_a_folder_is_explained(tmp_path):
    store = Store.open(str(tmp_path))
    store.write("a", b"1")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        store.write("a/b", b"2")


def test_a_file_system_without_hard_links_is_explained(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(StorageError, match="no hard links"):
        Store.open(str(tmp_path)).create("a", b"1")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"may not mount a small file system here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_is_explained(small_disk):
    store = Store.open(str(small_disk))
    store.write("a", b"old")
    with pytest.raises(StorageError, match="free space"):
        store.write("a", bytes(1 << 20))
    assert os.listdir(small_disk) == ["a"]
    assert store.read("a") == b"old"


class _Careless(MemoryFileSystem):
    """A store that ignores conditional writes."""

    protocol = "careless"

    def pipe_file(self, path, value, mode="overwrite", **options):
        super().pipe_file(path, value, mode="overwrite", **options)


def test_a_store_that_ignores_conditional_writes_is_found_out():
    fsspec.register_implementation("careless", _Careless, clobber=True)
    store = Store.open("careless://x")
    with pytest.raises(StorageError, match="ignores conditional writes"):
        check_conditional_create(store)
    assert store.list() == []


def test_a_place_that_cannot_be_written_is_found_out_by_writing(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match=r"cannot create .*/file/_probe/"):
        check_conditional_create(Store.open(str(tmp_path / "file")))


class _Refusing(MemoryFileSystem):
    """A store that answers a conditional write with the given S3 error codes before it obeys."""

    protocol = "refusing"
    answers = ()

    def pipe_file(self, path, value, mode="overwrite", **options):
        if type(self).answers:
            code, *type(self).answers = type(self).answers
            raise OSError(errno.EIO, code) from ClientError({"Error": {"Code": code}}, "PutObject")
        super().pipe_file(path, value, **options)


@pytest.mark.parametrize(
    ("answers", "created"),
    [
        (["PreconditionFailed"], False),
        (["ConditionalRequestConflict"] * 2, True),
        (["ConditionalRequestConflict", "PreconditionFailed"], False),
    ],
)
def test_the_answers_of_other_s3_servers_are_understood(monkeypatch, answers, created):
    fsspec.register_implementation("refusing", _Refusing, clobber=True)
    monkeypatch.setattr(_Refusing, "answers", answers)
    assert Store.open("refusing://x").create("a", b"1") is created


def test_a_conflict_without_end_may_be_tried_later(monkeypatch):
    fsspec.register_implementation("refusing", _Refusing, clobber=True)
    monkeypatch.setattr(_Refusing, "answers", ["ConditionalRequestConflict"] * 9)
    with pytest.raises(TimeoutError, match="ConditionalRequestConflict"):
        Store.open("refusing://x").create("a", b"1")
