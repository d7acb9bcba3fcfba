from ovref.ingest import ingest
from ovref.records import Caption, Noun, Prompt
from ovref.run_shard import run_shard
from ovref.select_prompts import SelectPrompts, select_prompts
from ovref.storage.file_store import Store
from ovref.storage.steps import open_step

CORPUS = [Caption(key=f"k{n}", text=f"cat {n}", source=f"c:{n}") for n in range(10)]


def prompts(captions):
    noun = Noun(text="cat", start=0, end=3)
    for caption in captions:
        yield Prompt(key=caption.key, caption=caption.text, nouns=(noun,), source=caption.source)


def flow(store: Store) -> list[dict]:
    """Three steps, each run twice; what is committed in each."""
    steps = [open_step(store, "captions", {"corpus": 1})]
    steps.append(open_step(store, "prompts", {}, [steps[0].fingerprint]))
    steps.append(open_step(store, "selected", {}, [steps[1].fingerprint]))
    for _ in range(2):
        ingest(iter(CORPUS), steps[0], 4)
        for shard in steps[0].complete():
            run_shard([prompts], steps[0], steps[1], shard)
        steps[1].finish(steps[0].complete())
        select_prompts(SelectPrompts(max_per_noun=6), steps[1], steps[2])
    assert [record.key for s in steps[2].complete() for record in steps[2].read(s)] == [
        f"k{n}" for n in range(6)
    ]
    assert not any(step.orphans() for step in steps)
    return [{s: commit.files for s, commit in step.commits().items()} for step in steps]


def test_a_store_on_s3_comes_to_hold_what_a_folder_holds(tmp_path, s3_store):
    assert flow(s3_store) == flow(Store.open(str(tmp_path)))
