"""The output of a small build, committed record by record: no stage runs and no model is loaded."""

import json
from pathlib import Path

import numpy as np

from ovref.contract import Dropped
from ovref.identity import record_key, spec_identity
from ovref.records import YES, Caption, ImageRecord, Noun, Prompt, Reference, Region
from ovref.reduce.collection import reduce_collection
from ovref.reduce.spec import ReduceSpec
from ovref.stages.embed import Embed
from ovref.storage.file_store import Store
from ovref.storage.steps import StepFolder, open_step
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig

SHARDS = ["000000", "000001", "000002"]
RECORDS = 4
"""Captions of a shard: the first has no noun, the image of the second no region."""
EMBED = Embed(visual=VisualEncoderConfig(model="fake"), text=TextEncoderConfig(model="fake"))


class FakeTexts:
    def encode(self, texts):
        return np.stack([vector(text, 6) for text in texts])


def vector(text, dim):
    found = np.random.default_rng(list(text.encode())).normal(size=dim)
    return (found / np.linalg.norm(found)).astype(np.float32)


def captions_of(shard):
    texts = [f"a cup {number} of {shard}" for number in range(RECORDS)]
    return [Caption(key=record_key("small", text), text=text, source="small") for text in texts]


def prompt_of(caption):
    nouns = (Noun(text="cup", start=2, end=5),)
    return Prompt(key=caption.key, caption=caption.text, nouns=nouns, source="small")


def image_of(caption):
    mask_hw = np.full((4, 4), YES, np.uint8)
    region = Region(noun=prompt_of(caption).nouns[0], mask_hw=mask_hw, score=1.0, source="daam")
    return ImageRecord(
        key=caption.key,
        caption=caption.text,
        source="small",
        image=b"\xff\xd8\xff blank",
        regions=(region,),
        seed=3,
    )


def reference_of(caption):
    return Reference(
        key=f"{caption.key}#0",
        noun=prompt_of(caption).nouns[0],
        caption=caption.text,
        box_xyxy=(0, 0, 4, 4),
        area=1.0,
        score=1.0,
        source="daam",
        seed=3,
        visual=vector(caption.text, 8).astype(np.float16),
        textual=vector(caption.key, 6).astype(np.float16),
    )


def commit_shard(steps: dict[str, StepFolder], name: str, shard: str) -> None:
    """The shard as the step `name` would commit it."""
    captions = captions_of(shard)
    made = {
        "captions": (captions, RECORDS + 1, [Dropped("line 7", "undecodable_text")]),
        "prompts": (
            [prompt_of(c) for c in captions[1:]],
            RECORDS,
            [Dropped(captions[0].key, "no_nouns")],
        ),
        "images": ([image_of(c) for c in captions[1:]], RECORDS - 1, []),
        "references": (
            [reference_of(c) for c in captions[2:]],
            RECORDS - 1,
            [Dropped(f"{captions[1].key}#0", "empty_mask")],
        ),
    }
    records, inputs, drops = made[name]
    steps[name].commit(shard, records, inputs=inputs, drops=drops)


def open_steps(store: Store) -> dict[str, StepFolder]:
    """The four steps, made where they are not there."""
    steps, parents = {}, []
    for name in ("captions", "prompts", "images", "references"):
        identity = {"stages": [spec_identity(EMBED)]} if name == "references" else {"small": name}
        steps[name] = open_step(store, name, identity, parents)
        parents = [steps[name].fingerprint]
    return steps


def build(store: Store, work: Path) -> dict[str, StepFolder]:
    """A finished build with its collection; the steps by name."""
    steps = open_steps(store)
    for name, step in steps.items():
        for shard in SHARDS:
            commit_shard(steps, name, shard)
        step.finish(SHARDS)
    store.write("build.json", json.dumps({"output": store.url}).encode())
    reduce_collection(
        steps["references"],
        ReduceSpec(),
        embed=EMBED,
        texts=FakeTexts(),
        output=store.child("collection"),
        work=work,
    )
    return steps
