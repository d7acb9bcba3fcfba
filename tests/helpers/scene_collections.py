"""Fixtures: small collections of the miniature, made of true masks of drawn training scenes."""

import io
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from ovref.config import dump
from ovref.identity import fingerprint
from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES
from ovref.records import NO, YES, ImageRecord, Noun, Reference, Region
from ovref.stages.embed import Embed
from ovref_inference.collection import format as fmt
from ovref_inference.collection import index as indexes
from ovref_inference.collection import store
from ovref_inference.collection.prototypes import PrototypeConfig
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig

EMBED = Embed(
    visual=VisualEncoderConfig(model="miniature:dinov2", size_hw=(64, 64)),
    text=TextEncoderConfig(model="miniature:clip"),
)


def image_record(seed):
    """A drawn training scene, as if it had been generated and attributed without error."""
    scene = render(seed, "train")
    buffer = io.BytesIO()
    Image.fromarray(scene.image_hwc).save(buffer, "png")
    regions = tuple(
        Region(
            noun=Noun(text=noun.lemma, start=noun.start, end=noun.end),
            mask_hw=np.where(scene.label_hw == CLASSES.index(noun.lemma), YES, NO).astype(np.uint8),
            score=1.0,
            source="truth",
        )
        for noun in scene.nouns
    )
    return ImageRecord(
        key=f"scene{seed}",
        caption=scene.caption,
        source="drawn",
        image=buffer.getvalue(),
        regions=regions,
    )


def publish_scenes(count, folder, url, embed=EMBED):
    """Publishes a collection of the first `count` training scenes at `url`."""
    folder.mkdir(parents=True)
    found = embed.build()(image_record(seed) for seed in range(count))
    references = [item for item in found if isinstance(item, Reference)]
    visual = np.array([reference.visual for reference in references])
    textual = np.array([reference.textual for reference in references])
    boxes = zip(*(reference.box_xyxy for reference in references), strict=True)
    rows = {
        "id": range(len(references)),
        "key": [r.key for r in references],
        "noun": [r.noun.text for r in references],
        "caption": [r.caption for r in references],
        "span_start": [r.noun.start for r in references],
        "span_end": [r.noun.end for r in references],
        **dict(zip(("x0", "y0", "x1", "y1"), map(list, boxes), strict=True)),
        "area": [r.area for r in references],
        "score": [r.score for r in references],
        "source": [r.source for r in references],
        "shard": ["00000"] * len(references),
        "seed": [r.seed for r in references],
    }
    nouns, counts = np.unique(rows["noun"], return_counts=True)
    zeros = [0] * len(nouns)
    vocabulary = {
        "noun": nouns.tolist(),
        "count": counts,
        "embedding": [textual[rows["noun"].index(noun)].astype(np.float32) for noun in nouns],
        "prototype_start": zeros,
        "prototype_stop": zeros,
        "neighbours": [[]] * len(nouns),
    }
    fmt.write_table(folder / fmt.FILES["references"], fmt.REFERENCE_SCHEMA, rows)
    fmt.write_table(folder / fmt.FILES["nouns"], fmt.NOUN_SCHEMA, vocabulary)
    none = fmt.tombstone_columns([], "")
    fmt.write_table(folder / fmt.FILES["tombstones"], fmt.TOMBSTONE_SCHEMA, none)
    fmt.write_vectors(folder / fmt.FILES["prototypes"], visual[:0])
    for kind, vectors in (("visual", visual), ("textual", textual)):
        fmt.write_vectors(folder / fmt.FILES[kind], vectors)
        indexes.write_index(indexes.build_index(vectors), folder / fmt.FILES[f"{kind}_index"])
    manifest = fmt.Manifest(
        fingerprint=fingerprint(embed),
        visual=_info(embed.visual, visual),
        textual=_info(embed.text, textual),
        templates=embed.templates,
        weights=embed.weights,
        visual_index=fmt.IndexInfo(factory="Flat"),
        textual_index=fmt.IndexInfo(factory="Flat"),
        prototypes=asdict(PrototypeConfig()),
    )
    store.publish(folder, str(url), manifest)


def _info(encoder, vectors):
    return fmt.EncoderInfo(
        model=encoder.model, revision="", dim=vectors.shape[1], settings=dump(encoder)
    )


@pytest.fixture(scope="session")
def collection_url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collection")
    publish_scenes(50, folder / "scratch", folder / "published")
    return str(folder / "published")


@pytest.fixture(scope="session")
def clip_collections(tmp_path_factory):
    """Collections in CLIP's space with references of every class, url by kind of features."""
    folder, urls = tmp_path_factory.mktemp("clip"), {}
    for features in ("crop_binary", "crop_none", "values"):
        visual = VisualEncoderConfig(
            model="miniature:clip", library="open_clip", features=features, size_hw=(64, 64)
        )
        urls[features] = str(folder / features)
        publish_scenes(50, folder / f"_{features}", urls[features], replace(EMBED, visual=visual))
    return urls


@pytest.fixture(scope="session")
def embed():
    """The encoders of `collection_url`."""
    return EMBED
