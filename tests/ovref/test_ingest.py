import time
import weakref
from threading import Barrier

import numpy as np
import pytest

import ovref.ingest
from ovref.contract import Dropped
from ovref.errors import InputError, StorageError
from ovref.ingest import KeySet, ingest
from ovref.records import Caption
from ovref.storage.file_store import Store
from ovref.storage.steps import StepFolder, open_step


def caption(n: int) -> Caption:
    return Caption(key=f"k{n}", text=f"caption {n}", source=f"c:{n}")


CORPUS = [caption(n) for n in range(8)]


@pytest.fixture
def target(tmp_path):
    return open_step(Store.open(str(tmp_path)), "captions", {"corpus": "x", "shard_size": 3})


def contents(target) -> dict[str, list[str]]:
    return {shard: [record.key for record in target.read(shard)] for shard in target.committed()}


def test_a_corpus_is_cut_in_its_order(target):
    progress = []
    summary = ingest(CORPUS, target, 3, progress.append)
    assert contents(target) == {
        "000000": ["k0", "k1", "k2"],
        "000001": ["k3", "k4", "k5"],
        "000002": ["k6", "k7"],
    }
    assert list(target.read("000001")) == CORPUS[3:6]
    assert target.complete() == ["000000", "000001", "000002"]
    assert (summary.shards, summary.captions, summary.dropped) == (3, 8, {})
    assert summary.finished
    assert [(p.shards, p.captions, p.finished) for p in progress] == [
        (1, 3, False), (2, 6, False), (3, 8, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "shard_size", "sizes"),
    [(1, 1, [1]), (3, 3, [3]), (4, 3, [3, 1]), (6, 3, [3, 3]), (2, 100, [2]), (3, 1, [1, 1, 1])],
)
def test_the_last_shard_is_as_long_as_it_must_be(target, count, shard_size, sizes):
    ingest(CORPUS[:count], target, shard_size)
    assert [len(keys) for keys in contents(target).values()] == sizes


def test_what_is_bad_or_said_twice_is_dropped_and_counted(target):
    half = Caption(key="kx", text="half \ud800 a pair", source="c:9")
    items = [
        Dropped("c#a:1", "undecodable_text"),
        caption(0),
        caption(1),
        caption(0),
        caption(2),
        caption(2),
        half,
        caption(3),
        Dropped("c:4", "malformed_record"),
        caption(0),
    ]
    summary = ingest(items, target, 3)
    assert contents(target) == {"000000": ["k0", "k1", "k2"], "000001": ["k3"]}
    assert summary.dropped == {
        "duplicate_caption": 3,
        "malformed_record": 1,
        "undecodable_text": 2,
    }
    assert target.drops("000000") == [
        Dropped("c#a:1", "undecodable_text"),
        Dropped("k0", "duplicate_caption"),
        Dropped("k2", "duplicate_caption"),
        Dropped("kx", "undecodable_text"),
    ]
    commits = target.commits().values()
    assert sum(commit.inputs for commit in commits) == len(items)
    assert all(c.inputs == c.outputs + sum(c.dropped.values()) for c in commits)


def test_a_finished_ingest_is_not_read_again(target):
    def unread():
        pytest.fail("the corpus was read")
        yield

    first = ingest([*CORPUS, CORPUS[0]], target, 3)
    assert ingest(unread(), target, 3) == first


class InterruptionError(Exception):
    pass


def interrupted(items, at):
    for number, item in enumerate(items):
        if number == at:
            raise InterruptionError
        yield item


@pytest.mark.parametrize("at", range(len(CORPUS) + 2))
def test_an_interrupted_ingest_goes_on_to_the_same_bytes(tmp_path, target, monkeypatch, at):
    items = [CORPUS[0], Dropped("c:1", "bad"), *CORPUS]
    with pytest.raises(InterruptionError):
        ingest(interrupted(items, at), target, 3)
    assert target.complete() is None
    before = set(target.committed())
    written = []
    publish = StepFolder.publish

    def noted(self, shard, files, **options):
        written.append(shard)
        return publish(self, shard, files, **options)

    monkeypatch.setattr(StepFolder, "publish", noted)
    summary = ingest(items, target, 3)
    assert before.isdisjoint(written) and before | set(written) == set(target.committed())
    whole = open_step(Store.open(str(tmp_path / "whole")), "captions", {})
    assert ingest(items, whole, 3) == summary
    assert files_of(target) == files_of(whole)


def files_of(target):
    return {shard: commit.files for shard, commit in target.commits().items()}


@pytest.mark.parametrize(
    "changed",
    [
        [caption(9), *CORPUS],
        [*CORPUS[:4], Dropped("c:4", "bad"), *CORPUS[5:]],
        [CORPUS[0], *CORPUS],
        [CORPUS[1], CORPUS[0], *CORPUS[2:]],
    ],
    ids=["longer", "a_bad_record", "a_duplicate", "another_order"],
)
def test_a_corpus_that_changed_on_the_way_is_refused(target, changed):
    with pytest.raises(InterruptionError):
        ingest(interrupted(CORPUS, 7), target, 3)
    assert len(target.committed()) == 2
    with pytest.raises(InputError, match="the corpus has changed since the build began: shard 00"):
        ingest(changed, target, 3)


def test_a_corpus_that_became_shorter_is_refused(target):
    with pytest.raises(InterruptionError):
        ingest(interrupted(CORPUS, 7), target, 3)
    with pytest.raises(InputError, match=r"has become shorter: .* shard 000001, .* ends with 0000"):
        ingest(CORPUS[:3], target, 3)
    assert target.complete() is None


@pytest.mark.parametrize("items", [[], [Dropped("c:1", "bad")] * 5])
def test_a_corpus_without_captions_is_refused(target, items):
    with pytest.raises(InputError, match="no usable caption") as caught:
        ingest(items, target, 3)
    assert not items or "{'bad': 5}" in str(caught.value)
    assert target.committed() == [] and target.complete() is None


def test_of_a_corpus_that_changed_nothing_is_added(target, monkeypatch):
    """Though shards are compared with it several at a time."""
    with pytest.raises(InterruptionError):
        ingest(interrupted(CORPUS, 4), target, 1)
    committed = target.committed()
    check = ovref.ingest._check_unchanged

    def late(*arguments):
        time.sleep(0.05)
        check(*arguments)

    monkeypatch.setattr(ovref.ingest, "_check_unchanged", late)
    with pytest.raises(InputError, match="has changed since the build began: shard 000002"):
        ingest([*CORPUS[:2], caption(9), *CORPUS[3:]], target, 1)
    assert target.committed() == committed


def test_shards_are_compared_several_at_a_time(target, monkeypatch):
    """One after another, going on with a corpus on S3 would take longer than beginning anew."""
    with pytest.raises(InterruptionError):
        ingest(interrupted(CORPUS, 7), target, 1)
    together = Barrier(6)
    check = ovref.ingest._check_unchanged

    def with_others(*arguments):
        together.wait(10)
        check(*arguments)

    monkeypatch.setattr(ovref.ingest, "_check_unchanged", with_others)
    ingest(CORPUS, target, 1)
    assert list(contents(target).values()) == [[item.key] for item in CORPUS]


def test_a_shard_holds_a_caption_at_least(target):
    with pytest.raises(ValueError, match="shard_size must be at least 1, found 0"):
        ingest(CORPUS, target, 0)


def test_captions_are_not_held(target):
    """A caption is written when it is read: images would not fit in memory together."""
    alive = weakref.WeakSet()

    def watched():
        for n in range(30):
            item = caption(n)
            alive.add(item)
            assert len(alive) <= 3
            yield item

    ingest(watched(), target, 10)
    assert len(target.committed()) == 3


def test_an_upload_that_fails_fails_the_ingest(target, monkeypatch):
    publish = StepFolder.publish

    def full(self, shard, files, **options):
        if shard == "000001":
            raise StorageError("the disk or quota is full")
        return publish(self, shard, files, **options)

    with monkeypatch.context() as patched:
        patched.setattr(StepFolder, "publish", full)
        with pytest.raises(StorageError, match="full"):
            ingest(CORPUS, target, 3)
    assert target.committed() == ["000000", "000002"] and target.complete() is None
    ingest(CORPUS, target, 3)
    assert [record for shard in target.complete() for record in target.read(shard)] == CORPUS


def test_no_temporary_file_stays(target, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with pytest.raises(InterruptionError):
        ingest(interrupted(CORPUS, 7), target, 3)
    assert list(scratch.iterdir()) == []
    ingest(CORPUS, target, 3)
    assert list(scratch.iterdir()) == []


def test_a_key_set_is_a_set():
    keys, seen, random = KeySet(), set(), np.random.default_rng(0)
    for number in random.integers(0, 5000, 20_000):
        key = f"{number:024x}"
        assert keys.add(key) is (key not in seen)
        seen.add(key)
    assert keys.add("ä key of any length " * 20)
    assert not keys.add("ä key of any length " * 20)
