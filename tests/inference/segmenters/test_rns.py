"""RNS: its rows and its head against slow loops, and whole on a world of colours."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from colour_world import COLOURS, GREY, Texts, collection, picture, unit

from ovref_inference.proposers.load import no_proposals
from ovref_inference.proposers.proposals import OpenClasses, Proposals
from ovref_inference.segmenters.rns import RnsConfig, RnsSegmenter
from ovref_inference.segmenters.rns_head import References, RnsHeadConfig, head_scores
from ovref_inference.segmenters.windows import WindowConfig
from ovref_inference.vectors import l2_normalised

NAMES = ["red", "green", "blue"]
LABELS = np.array([[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [2, 2, 2, 2, 2]]).repeat(4, 0).repeat(4, 1)
COUNTS = {"red": 6, "green": 5, "blue": 4}
FAST = RnsHeadConfig(steps=150, learning_rate=0.05)


class Dense:
    """Features are mean colours of 2 x 2 patches, around grey."""

    def encode(self, images):
        cells = [
            i.reshape(i.shape[0] // 2, 2, i.shape[1] // 2, 2, 3).astype(np.float32).mean((1, 3))
            for i in images
        ]
        return [one - GREY for one in cells]


class Clip(Texts):
    """The whole image is its mean colour."""

    def encode_images(self, images):
        return np.stack([unit(image.reshape(-1, 3).mean(0)) for image in images])


def segmenter(tmp_path, proposer=no_proposals, counts=COUNTS, joint=True, **config):
    opened = collection(tmp_path, counts)
    if joint:
        opened.manifest = replace(opened.manifest, visual=opened.manifest.textual)
    # Cosines of colours lie farther apart than CLIP's, which RNS's factor of 10 is made for.
    config = RnsConfig(**{"windows": None, "head": FAST, "class_scale": 1.0} | config)
    return RnsSegmenter(opened, Dense(), Clip(), proposer, config)


def slow_head(items, references, weights, texts, config):
    """Row by row and step by step, with gradients and AdamW written out."""
    classes = len(references.means_cd)
    chosen = set()
    for item in items:
        order = sorted(
            range(len(references.vectors_md)), key=lambda r: -float(item @ references.vectors_md[r])
        )
        chosen |= set(order[: config.k])
    rows = [(references.vectors_md[r], int(references.labels_m[r]), None, 1.0) for r in chosen]
    for label in sorted({label for _, label, _, _ in rows}):
        for share in config.mixtures:
            vector = share * references.means_cd[label] + (1 - share) * texts[label]
            vector = vector / np.linalg.norm(vector)
            rows.append((vector, label, None, config.mixture_weight))
    for label in set(range(classes)) - set(references.labels_m.tolist()):
        own = [item for item in items if int(np.argmax(texts @ item)) == label]
        if own:
            mean = np.mean(own, axis=0)
            mean = mean / np.linalg.norm(mean)
            for share in config.mixtures:
                vector = share * mean + (1 - share) * texts[label]
                vector = vector / np.linalg.norm(vector)
                powers = [math.exp(100 * float(text @ vector)) for text in texts]
                soft = np.array(powers) / sum(powers)
                rows.append((vector, int(soft.argmax()), soft, config.pseudo_weight))
    total = sum(weights[label] for _, label, _, _ in rows)
    generator = torch.Generator().manual_seed(config.seed)
    start = torch.empty(classes, items.shape[1])
    bound = math.sqrt(6 / items.shape[1])
    values = start.uniform_(-bound, bound, generator=generator).double().numpy()
    parameters = np.concatenate([values, np.zeros((classes, 1))], axis=1)
    first, second = np.zeros_like(parameters), np.zeros_like(parameters)
    for step in range(1, config.steps + 1):
        gradient = np.zeros_like(parameters)
        for vector, label, soft, kind in rows:
            row = np.append(vector, 1.0)
            logits = parameters @ row
            powers = np.exp(logits - logits.max())
            target = np.eye(classes)[label] if soft is None else soft
            error = powers / powers.sum() - target
            gradient += kind * weights[label] / total / len(rows) * np.outer(error, row)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        parameters = parameters * (1 - config.learning_rate * config.weight_decay)
        moved = first / (1 - 0.9**step)
        parameters = parameters - config.learning_rate * moved / (
            np.sqrt(second / (1 - 0.999**step)) + 1e-8
        )
    logits = np.stack([parameters @ np.append(item, 1.0) for item in items])
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize("with_texts", [True, False])
def test_the_head_is_a_slow_one(with_texts):
    rng = np.random.default_rng(3)
    directions = l2_normalised(rng.normal(size=(5, 8)))
    labels = np.array([0, 0, 1, 1, 1, 2, 4, 4])  # of class 3 there are none
    vectors = l2_normalised(directions[labels] + 0.1 * rng.normal(size=(8, 8)))
    means = np.zeros((5, 8), np.float32)
    for label in (0, 1, 2, 4):
        means[label] = l2_normalised(vectors[labels == label].mean(0))
    items = l2_normalised(directions[[0, 1, 3, 3, 3, 2]] + 0.1 * rng.normal(size=(6, 8)))
    texts = l2_normalised(directions + 0.05 * rng.normal(size=(5, 8)))
    weights = rng.random(5).astype(np.float32)
    weights /= weights.sum()
    references = References(vectors_md=vectors, labels_m=labels, means_cd=means)
    config = RnsHeadConfig(k=2, steps=60, learning_rate=0.02)
    given = texts if with_texts else None
    with torch.inference_mode():
        found = head_scores(items, references, weights, config, texts_cd=given)
    slow = slow_head(items, references, weights, texts if with_texts else means, config)
    np.testing.assert_allclose(found, slow, atol=2e-4)


@pytest.mark.parametrize("joint", [True, False])
def test_it_finds_the_colours_by_patches_and_by_regions(tmp_path, joint):
    regions = [label == LABELS for label in range(2)]  # what is blue is in no mask
    images = [picture(LABELS, NAMES), picture(LABELS.T, NAMES)]
    masks = [np.stack(regions), np.stack([one.T for one in regions])]
    by_patches = segmenter(tmp_path / "patches", joint=joint).segment(images, NAMES[::-1])
    by_regions = segmenter(tmp_path / "regions", lambda _: masks, joint=joint).segment(
        images, NAMES[::-1]
    )
    said = OpenClasses(
        embeddings_nd=np.ones((2, 3)), void_d=np.ones(3), scale=1.0, templates=("a {}.",)
    )
    soft = [Proposals(mask_probs_nhw=one.astype(np.float32), open_classes=said) for one in masks]
    by_soft = segmenter(tmp_path / "soft", lambda _: soft, joint=joint).segment(images, NAMES[::-1])
    for found in (by_patches, by_regions, by_soft):
        np.testing.assert_array_equal(found[0].labels_hw, 2 - LABELS)
        np.testing.assert_array_equal(found[1].labels_hw, 2 - LABELS.T)
        np.testing.assert_allclose(found[0].scores_chw.sum(0), 1, atol=1e-5)


def test_an_image_does_not_depend_on_its_neighbours(tmp_path):
    images = [picture(LABELS, NAMES), picture(LABELS.T, ["blue", "red", "green"])]
    it = segmenter(tmp_path)
    together = it.segment(images, NAMES)
    for image, one in zip(images, together, strict=True):
        np.testing.assert_array_equal(it.segment([image], NAMES)[0].scores_chw, one.scores_chw)
    assert it.segment([], NAMES) == []


def test_windows_share_one_head(tmp_path, monkeypatch):
    import ovref_inference.segmenters.rns as rns

    fitted = []

    def head(items_nd, *args, **kwargs):
        fitted.append(len(items_nd))
        return head_scores(items_nd, *args, **kwargs)

    monkeypatch.setattr(rns, "head_scores", head)
    windows = WindowConfig(short_side=12, crop=8, stride=4)
    (found,) = segmenter(tmp_path, windows=windows).segment([picture(LABELS, NAMES)], NAMES)
    assert fitted == [8 * 16]  # 2 x 4 windows of 4 x 4 patches
    assert (found.labels_hw == LABELS).mean() > 0.9


def test_rows_count_by_what_the_image_is_of(tmp_path):
    image = np.full((4, 4, 3), COLOURS["red"], np.uint8)
    for joint in (True, False):
        it = segmenter(tmp_path / str(joint), joint=joint, class_scale=10.0)
        prepared = it.prepare(NAMES)
        items = l2_normalised(Dense().encode([image])[0].reshape(4, 3))
        weights = it._class_weights([image], items, prepared)
        cosines = [float(unit(COLOURS["red"]) @ unit(COLOURS[name])) for name in NAMES]
        powers = [math.exp(10 * cosine) for cosine in cosines]
        np.testing.assert_allclose(weights, [p / sum(powers) for p in powers], rtol=1e-5)


def test_the_nearest_references_of_a_class_are_taken(tmp_path):
    it = segmenter(tmp_path, max_references=2)
    prepared = it.prepare(NAMES)
    assert np.bincount(prepared.references.labels_m).tolist() == [2, 2, 2]
    stored = it.collection.visual[it.collection.references_of("green")].astype(np.float32)
    expected = l2_normalised(stored[:2])
    np.testing.assert_allclose(prepared.references.vectors_md[2:4], expected, atol=1e-6)
    np.testing.assert_allclose(
        prepared.references.means_cd[1], l2_normalised(expected.mean(0)), atol=1e-6
    )


def test_a_class_without_support_is_missing_or_learnt_from_text(tmp_path):
    image = picture(LABELS, ["red", "green", "yellow"])
    counts = {"red": 6, "green": 5}
    missing = segmenter(tmp_path / "missing", counts=counts)
    with pytest.warns(UserWarning, match="yellow.*will not be predicted"):
        (found,) = missing.segment([image], ["red", "green", "yellow"])
    assert found.missing == ("yellow",) and not (found.labels_hw == 2).any()
    head = RnsHeadConfig(steps=400, learning_rate=0.05)
    by_text = segmenter(tmp_path / "text", counts=counts, unsupported="text", head=head)
    with pytest.warns(UserWarning, match="yellow.*will be learnt from what their texts find"):
        (found,) = by_text.segment([image], ["red", "green", "yellow"])
    np.testing.assert_array_equal(found.labels_hw, LABELS)
    assert found.missing == ()
    with pytest.raises(ValueError, match="no references for any of pipette"):
        by_text.prepare(["pipette"])


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(ValueError, match="references of colours and texts of words"):
        segmenter(tmp_path / "text", joint=False, unsupported="text")
    opened = collection(tmp_path / "crops", COUNTS)
    with pytest.raises(ValueError, match="is of masked crops"):
        RnsSegmenter(opened, object(), Clip(), no_proposals)


@pytest.mark.parametrize(
    "settings", [{"max_references": 0}, {"class_scale": -1.0}, {"unsupported": "else"}]
)
def test_parameters_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RnsConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"k": 0},
        {"steps": 0},
        {"mixtures": ()},
        {"mixtures": (0.5, 1.5)},
        {"mixture_weight": -0.1},
        {"learning_rate": 0.0},
        {"seed": -1},
    ],
)
def test_settings_of_the_head_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RnsHeadConfig(**settings)
