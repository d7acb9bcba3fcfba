import os

import numpy as np
import pytest

from ovref.contract import Dropped
from ovref.errors import AccountingError, StorageError
from ovref.records import Caption, Noun, Prompt, Reference
from ovref.run_shard import run_alone, run_shard
from ovref.storage.file_store import Store
from ovref.storage.steps import open_step


@pytest.fixture
def store(tmp_path):
    return Store.open(str(tmp_path / "store"))


@pytest.fixture
def source(store):
    """Captions `k0` to `k5` in one shard."""
    step = open_step(store, "captions", {"corpus": 1})
    captions = [Caption(key=f"k{n}", text=f"cat {n}", source=f"c:{n}") for n in range(6)]
    step.commit("000000", captions, inputs=6)
    return step


@pytest.fixture
def target(store, source):
    return open_step(store, "prompts", {"stage": 1}, [source.fingerprint])


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Temporary files go into one folder, which every test leaves empty."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    assert os.listdir(folder) == []


def prompt(caption: Caption, key: str | None = None) -> Prompt:
    noun = Noun(text="cat", start=0, end=3)
    return Prompt(
        key=key or caption.key, caption=caption.text, nouns=(noun,), source=caption.source
    )


def prompts(records):
    for record in records:
        yield prompt(record)


def prompts_without_k1(records):
    for record in records:
        yield Dropped("k1", "no_nouns") if record.key == "k1" else prompt(record)


def references(records):
    """Two of each prompt; the second of an even one is given up."""
    for record in records:
        for number in range(2):
            key = f"{record.key}#{number}"
            if number and int(record.key[1]) % 2 == 0:
                yield Dropped(key, "empty_mask")
                continue
            yield Reference(
                key=key,
                noun=record.nouns[0],
                caption=record.caption,
                box_xyxy=(0, 0, 1, 1),
                area=0.5,
                score=0.5,
                source="daam",
                seed=None,
                visual=np.ones(4, np.float16),
                textual=np.ones(3, np.float16),
            )


def test_a_shard_goes_through_the_chain_and_keeps_its_name(source, target):
    commit = run_shard([prompts_without_k1, references], source, target, "000000", attempt=2)
    assert commit == target.commit_of("000000")
    assert (commit.inputs, commit.outputs, commit.attempt) == (6, 7, 2)
    assert commit.dropped == {"no_nouns": 1} and commit.dropped_parts == {"empty_mask": 3}
    assert commit.seconds > 0
    assert [record.key for record in target.read("000000")] == [
        "k0#0", "k2#0", "k3#0", "k3#1", "k4#0", "k5#0", "k5#1",
    ]  # fmt: skip
    assert [drop.key for drop in target.drops("000000")] == ["k0#1", "k1", "k2#1", "k4#1"]


def test_a_stage_sees_records_alone(source, target):
    seen = []

    def watching(records):
        for record in records:
            seen.append(record)
            yield record

    run_shard([prompts_without_k1, watching], source, target, "000000")
    assert [type(record) for record in seen] == [Prompt] * 5


def test_no_stage_at_all_copies_the_shard(source, target):
    commit = run_shard([], source, target, "000000")
    assert list(target.read("000000")) == list(source.read("000000"))
    assert commit.files == source.commit_of("000000").files


def test_records_flow_one_by_one(source, target):
    """No stage, and nothing around it, holds the shard."""
    events = []

    def named(name):
        def stage(records):
            for record in records:
                events.append((name, record.key))
                yield record

        return stage

    run_shard([named("a"), named("b")], source, target, "000000")
    assert events[:4] == [("a", "k0"), ("b", "k0"), ("a", "k1"), ("b", "k1")]


def test_what_is_committed_is_not_run_again(source, target):
    first = run_shard([prompts], source, target, "000000")

    def fail(records):
        pytest.fail("the stage ran")
        yield

    assert run_shard([fail], source, target, "000000", attempt=1) == first


def test_attempts_agree_whatever_the_batches(store, source):
    """A stage that takes two at a time and turns their drops round gives the same files."""

    def in_batches(size):
        def stage(records):
            batch = []
            for record in records:
                batch.append(record)
                if len(batch) == size or record.key == "k5":
                    drops = [Dropped(r.key, "odd") for r in batch if int(r.key[1]) % 2]
                    yield from reversed(drops)
                    yield from (prompt(r) for r in batch if not int(r.key[1]) % 2)
                    batch = []

        return stage

    files = []
    for size in (1, 2, 6):
        target = open_step(store, f"prompts_{size}", {})
        files.append(run_shard([in_batches(size)], source, target, "000000").files)
    assert files[0] == files[1] == files[2]
    assert "drops.jsonl" in files[0]


# -- answers that do not add up --------------------------------------------------------------------


def leaves_out(records):
    for record in records:
        if record.key not in ("k2", "k4"):
            yield prompt(record)


def takes_a_few(records):
    for _ in range(3):
        yield prompt(next(records))


def answers_nothing(records):
    return iter(())


def invents(records):
    for record in records:
        yield prompt(record, key=f"x{record.key}")


def invents_a_drop(records):
    for record in records:
        yield prompt(record)
    yield Dropped("k6", "no_nouns")


def answers_before_it_is_asked(records):
    yield Dropped("k0", "no_nouns")
    yield from prompts(records)


def repeats(records):
    for record in records:
        yield prompt(record)
        yield prompt(record)


def drops_twice(records):
    for record in records:
        yield Dropped(record.key, "no_nouns")
        yield Dropped(record.key, "no_nouns")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (leaves_out, "left 2 of 6 inputs without an output or a drop: k2, k4$"),
        (takes_a_few, "left 3 of 6 inputs without an output or a drop: k3, k4, k5$"),
        (answers_nothing, "left 6 of 6 .*: k0, k1, k2, k3, k4, ...$"),
        (invents, "answered 'xk0', which is not one of its inputs"),
        (invents_a_drop, "answered 'k6', which is not one of its inputs"),
        (answers_before_it_is_asked, "answered 'k0', which is not one of its inputs"),
        (repeats, "returned two records with the key 'k0'"),
        (drops_twice, "dropped 'k0' twice"),
    ],
)
@pytest.mark.parametrize("position", [1, 2], ids=["first", "second"])
def test_answers_that_do_not_add_up_are_a_bug(source, target, stage, message, position):
    def same(records):
        yield from records

    chain = [stage] if position == 1 else [same, stage]
    with pytest.raises(AccountingError, match=message) as caught:
        run_shard(chain, source, target, "000000")
    assert f"stage {position} of {len(chain)}, {stage.__name__}, shard 000000" in str(caught.value)
    assert target.store.list() == ["step.json"]


def test_a_region_may_be_given_up_by_two_stages(source, target):
    """Each numbers the regions that the one before has left."""

    def drops_a_region(records):
        for record in records:
            yield Dropped(f"{record.key}#0", "empty_mask")
            yield record

    commit = run_shard([prompts, drops_a_region, drops_a_region], source, target, "000000")
    assert commit.dropped == {} and commit.dropped_parts == {"empty_mask": 12}
    assert commit.outputs == 6


def test_a_drop_of_a_region_answers_its_record(source, target):
    def drops_regions(records):
        for record in records:
            yield Dropped(f"{record.key}#0", "empty_mask")
            yield Dropped(f"{record.key}#1", "full_mask")

    commit = run_shard([drops_regions], source, target, "000000")
    assert commit.outputs == 0
    assert commit.dropped_parts == {"empty_mask": 6, "full_mask": 6}


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, MemoryError])
def test_what_a_stage_raises_comes_out_and_nothing_is_written(source, target, error):
    def fails_at_k3(records):
        for record in records:
            if record.key == "k3":
                raise error
            yield record

    with pytest.raises(error):
        run_shard([prompts, fails_at_k3], source, target, "000000")
    assert target.store.list() == ["step.json"]
    assert run_shard([prompts], source, target, "000000").outputs == 6


def test_a_shard_that_the_source_lacks_is_named(source, target):
    with pytest.raises(StorageError, match=r"shard 000009 of .* is not committed"):
        run_shard([prompts], source, target, "000009")
    assert target.store.list() == ["step.json"]


def test_a_damaged_source_is_noticed_before_any_work(source, target):
    name = source.commit_of("000000").files["tar"].name
    source.store.write(name, source.store.read(name)[:-512])

    def fail(records):
        for _ in records:
            pytest.fail("a record of a damaged shard was read")
        yield

    with pytest.raises(StorageError, match="is not what was committed"):
        run_shard([fail], source, target, "000000")


def test_a_full_disk_under_the_target_commits_nothing(source, target, monkeypatch):
    upload = Store.upload

    def second_upload_fails(store, local_path, path):
        if path.endswith(".tar"):
            raise StorageError("the disk or quota is full")
        upload(store, local_path, path)

    monkeypatch.setattr(Store, "upload", second_upload_fails)
    with pytest.raises(StorageError, match="full"):
        run_shard([prompts], source, target, "000000")
    assert target.committed() == []


def test_a_record_left_out_gives_the_bytes_of_a_first_stage_that_drops_it(store, source, target):
    commit = run_shard([prompts], source, target, "000000", without={1: "no_nouns"})
    dropping = open_step(store, "dropping", {"stage": 2}, [source.fingerprint])
    other = run_shard([prompts_without_k1], source, dropping, "000000")
    assert commit.files == other.files and commit.dropped == other.dropped == {"no_nouns": 1}
    assert (commit.inputs, commit.outputs) == (6, 5)


def test_a_record_alone_goes_through_all_stages_and_is_encoded(source):
    seen = []

    def watching(records):
        for record in records:
            seen.append(record.key)
            yield Dropped(record.key, "seen") if record.key == "k1" else record

    for record in source.read("000000"):
        run_alone([prompts, watching, watching], record)
    assert seen == [key for n in range(6) for key in [f"k{n}"] * (1 if n == 1 else 2)]
    with pytest.raises(TypeError):
        run_alone([lambda records: (object() for _ in records)], record)


def test_stages_are_closed_when_a_record_cannot_be_written(source, target):
    """A stage may work ahead in threads of its own; these must not outlive the shard's attempt."""
    closed = []

    def stage(records):
        try:
            for record in records:
                yield prompt(record) if record.key == "k0" else record  # another kind
        finally:
            closed.append("stage")

    with pytest.raises(TypeError, match="of kind caption in a shard of kind prompt") as error:
        run_shard([stage], source, target, "000000")
    assert error.traceback and closed == ["stage"]


def test_a_watcher_learns_how_many_inputs_are_answered(source, target):
    seen = []
    run_shard(
        [prompts_without_k1, references], source, target, "000000",
        watch=lambda done, dropped: seen.append((done, dropped)),
    )  # fmt: skip
    # k1 is dropped whole, and of k0, k2 and k4 the second part; each is known when more comes out.
    assert seen == [(1, 0), (3, 2), (4, 3), (4, 3), (5, 3), (6, 4), (6, 4)]
