"""progress.json: the state of a build, for other processes."""

import json

import pytest

from ovref.errors import StorageError
from ovref.storage.file_store import Store
from ovref_pipelines import live
from ovref_pipelines.live import EVERY_SECONDS, PROGRESS, Live


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def store(tmp_path):
    return Store.open(str(tmp_path))


def counts(done):
    return {"step": "images", "records": 10, "records_done": done, "cost": 1.5}


def test_it_is_rewritten_every_few_seconds_and_at_the_end(store):
    clock = Clock()
    state = Live(store, clock)
    assert live.read(store) is None
    with state.during():
        state.message("images: 10 records")
        state.watch([counts(3)])
        assert live.read(store)["steps"] == {}
        clock.now = EVERY_SECONDS
        state.watch([counts(4)])
        found = live.read(store)
        assert (found["state"], found["doing"], found["cost"]) == (
            "running", "images: 10 records", 1.5,
        )  # fmt: skip
        assert found["steps"]["images"]["records_done"] == 4 and found["age_seconds"] < 60
        state.watch([counts(10)])
    found = live.read(store)
    assert found["state"] == "done" and found["steps"]["images"]["records_done"] == 10


def test_an_early_end_says_why_and_a_silent_one_is_noticed(store):
    with pytest.raises(KeyboardInterrupt), Live(store).during():
        raise KeyboardInterrupt("enough")
    assert live.read(store)["state"] == "ended"
    assert live.read(store)["doing"] == "KeyboardInterrupt: enough"
    tree = json.loads(store.read(PROGRESS)) | {
        "state": "running", "time": "2020-01-01T00:00:00+00:00",
    }  # fmt: skip
    store.write(PROGRESS, json.dumps(tree).encode())
    assert live.read(store)["state"] == "gone"
    store.write(PROGRESS, b"{")
    assert live.read(store) is None


def test_a_build_goes_on_where_it_cannot_be_written(store, monkeypatch, caplog):
    def full(self, path, data):
        raise StorageError("the disk is full")

    monkeypatch.setattr(Store, "write", full)
    with Live(store).during():
        pass
    assert "cannot be written: the disk is full" in caplog.text
