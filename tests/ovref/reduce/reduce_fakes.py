"""Small seeded references, committed through the real storage code, and reductions of them."""

import hashlib

import numpy as np

from ovref.contract import Dropped
from ovref.identity import spec_identity
from ovref.records import Noun, Reference
from ovref.reduce import ReduceSpec, reduce_collection
from ovref.stages.embed import Embed
from ovref.storage.file_store import Store
from ovref.storage.steps import open_step
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.vectors import l2_normalised

D_VISUAL, D_TEXTUAL = 12, 8
COUNTS = {"boat": 40, "cat": 30, "dog": 25, "lion": 3, "tree": 20}
EMBED = Embed(
    visual=VisualEncoderConfig(model="fake-visual", revision="v1"),
    text=TextEncoderConfig(model="fake-text"),
    templates=("a {}", "the {}"),
)


class FakeTexts:
    """Each text's own direction. A lion is nearly a cat."""

    def encode(self, texts):
        rows = []
        for text in texts:
            row = direction(text.replace("lion", "cat"), D_TEXTUAL)
            rows.append(row + 0.2 * direction(text, D_TEXTUAL))
        return l2_normalised(np.stack(rows))


def direction(text, dim):
    seed = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
    return np.random.default_rng(seed).standard_normal(dim)


def make_references(counts=COUNTS, seed=0, noise=0.15, per_image=2):
    """References in random order, some of them of one image."""
    rng = np.random.default_rng(seed)
    nouns = rng.permutation(np.repeat(sorted(counts), [counts[noun] for noun in sorted(counts)]))
    found = []
    for number, noun in enumerate(nouns.tolist()):
        image, region = divmod(number, per_image)
        visual = direction(noun, D_VISUAL) / 3 + noise * rng.standard_normal(D_VISUAL)
        textual = direction(noun, D_TEXTUAL) / 3 + 0.05 * rng.standard_normal(D_TEXTUAL)
        found.append(
            Reference(
                key=f"{seed:02x}{image:022x}#{region}",
                noun=Noun(text=noun, start=2, end=2 + len(noun)),
                caption=f"a {noun}, number {image}",
                box_xyxy=(1, 2, 30 + region, 40),
                area=float(rng.uniform(0.01, 0.9)),
                score=float(rng.uniform(0, 1)),
                source="daam",
                seed=number if number % 3 else None,
                visual=l2_normalised(visual).astype(np.float16),
                textual=l2_normalised(textual).astype(np.float16),
            )
        )
    return found


def commit_step(
    root, references, shards=3, name="references", run=0, order=None, finish=True, embed=EMBED
):
    """The references as a step of some shards, every n-th in one; returns its folder."""
    identity = {"stages": [spec_identity(embed)], "run": run}
    step = open_step(Store.open(str(root)), name, identity)
    names = [f"{number:05d}" for number in range(shards)]
    for number in order or range(shards):
        part = references[number::shards]
        keys = {reference.key.partition("#")[0] for reference in part}
        drops = [Dropped("dd#0", "empty_mask"), Dropped("ee", "corrupt_image")]
        step.commit(names[number], part, inputs=len(keys) + 2, drops=drops)
    if finish:
        step.finish(names)
    return step


def reduce_into(target, step, spec=None, **options):
    """The collection at `target` of a step (or several); returns the summary."""
    defaults = {
        "embed": EMBED,
        "work": target.with_name(f"{target.name}_work"),
        "licences": ("CC-BY-4.0",),
    }
    return reduce_collection(
        step,
        spec or ReduceSpec(),
        texts=FakeTexts(),
        output=Store.open(str(target)),
        **(defaults | options),
    )
