"""Single records out of a step's shards."""

import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ovref.errors import StorageError
from ovref.records import YES, ImageRecord, Noun, Region
from ovref.storage import samples
from ovref.storage.file_store import Store
from ovref.storage.samples import Samples
from ovref.storage.steps import open_step

SHARDS = [f"{number:06d}" for number in range(3)]


def image(key):
    rng = np.random.default_rng(list(key.encode()))
    mask_hw = np.where(rng.random((6, 8)) < 0.5, YES, 0).astype(np.uint8)
    region = Region(noun=Noun(text="cup", start=2, end=5), mask_hw=mask_hw, score=1.0, source="x")
    return ImageRecord(
        key=key, caption="a cup", source="test", image=b"\xff\xd8\xff" + key.encode(),
        regions=(region,), heatmaps_nhw=rng.random((1, 3, 4)).astype(np.float16), seed=7,
    )  # fmt: skip


@pytest.fixture(params=["local", "memory"])
def step(request, tmp_path):
    url = str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"
    found = open_step(Store.open(url), "images", {"test": 1})
    for shard in SHARDS:
        records = [image(f"k{shard}{number}") for number in range(5)]
        found.commit(shard, records, inputs=5)
    yield found
    if request.param == "memory":
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def equal(one, other):
    return (
        (one.key, one.caption, one.image, one.seed)
        == (other.key, other.caption, other.image, other.seed)
        and np.array_equal(one.regions[0].mask_hw, other.regions[0].mask_hw)
        and np.array_equal(one.heatmaps_nhw, other.heatmaps_nhw)
    )


def test_each_record_is_the_one_that_reading_the_shard_gives(step):
    found = Samples(step)
    for shard in SHARDS:
        records = list(step.read(shard))
        assert found.keys(shard) == [record.key for record in records]
        assert all(equal(found.get(shard, record.key), record) for record in records[::-1])
    found.close()


def test_few_shards_are_kept_and_copies_are_removed(step, monkeypatch):
    monkeypatch.setattr(samples, "SHARDS", 1)
    found = Samples(step)
    paths = []
    for shard in [*SHARDS, SHARDS[0]]:
        assert found.get(shard, f"k{shard}2").key == f"k{shard}2"
        paths += [Path(copy.name) for copy in found._copies._kept.values()]
        assert found._members.cache_info().currsize == 1
        assert sum(path.exists() for path in paths) == (not step.store.is_local)
    found.close()
    assert not any(path.exists() for path in paths)


def test_threads_share_it(step):
    found, wrong = Samples(step), []

    def ask(offset):
        for number in range(30):
            key = f"k{SHARDS[(number + offset) % 3]}{number % 5}"
            if found.get(key[1:7], key).key != key:
                wrong.append(key)

    threads = [threading.Thread(target=ask, args=[offset]) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.close()
    assert wrong == []


def test_what_is_not_there_or_damaged_is_said(step):
    found = Samples(step)
    with pytest.raises(StorageError, match="has no record nobody"):
        found.get(SHARDS[0], "nobody")
    with pytest.raises(StorageError, match="is not committed"):
        found.get("000009", "k")
    if step.store.is_local:
        name = step.required(SHARDS[1]).files["tar"].name
        data = step.store.read(name)
        step.store.write(name, data[:-100])
        with pytest.raises(StorageError, match="is cut off"):
            found.get(SHARDS[1], f"k{SHARDS[1]}0")
        step.store.write(name, b"\0" * 600 + data[600:])
        with pytest.raises(StorageError, match="shard"):
            found.get(SHARDS[1], f"k{SHARDS[1]}0")
    found.close()
