"""The configurations that ovref ships: all of them are read, and the captions are the grammar's."""

import pytest

from ovref.config import load
from ovref_pipelines.recipe import BuildConfig
from shipped_configs import BUILDS, CONFIGS

CORPUS = ["corpus.path=captions.json"]
WITH_CORPUS = ("coco500", "retclip_open_images")
"""Configurations of a certain corpus."""


def of_mine(path):
    """Settings of another corpus; one of labels keeps its format."""
    return ["corpus.path=mine", "output=x", *["corpus.format=text"] * ("open" not in path.stem)]


@pytest.mark.parametrize("path", BUILDS, ids=lambda path: path.stem)
def test_every_build_configuration_is_read(path):
    given = ["corpus.path=captions.txt"] * ("\ncorpus:" not in path.read_text())
    if path.stem == "own_captions":  # needs nothing but these two
        given.append("output=runs/own_captions")
    config = load(BuildConfig, path, given)
    assert config.output == f"runs/{path.stem}"


@pytest.mark.parametrize("path", BUILDS, ids=lambda path: path.stem)
def test_no_configuration_speaks_of_a_corpus_that_may_be_another(path):
    config = load(BuildConfig, path, of_mine(path))
    if path.stem not in WITH_CORPUS:
        assert config.corpus.licence is None and config.licences == ()
        assert config.corpus.corpus_id is None


def test_every_evaluation_is_read_and_fits_its_build():
    from ovref.evaluation.evaluate import EvaluateSpec

    spec = load(EvaluateSpec, CONFIGS / "miniature_evaluate.yaml")
    build = load(BuildConfig, CONFIGS / "miniature.yaml")
    assert spec.collection == f"{build.output}/collection"


def test_fossil_is_as_the_paper_says():
    config = load(BuildConfig, CONFIGS / "fossil.yaml", CORPUS)
    assert config.synthesize.steps == 50 and config.synthesize.binarise.threshold == 0.45
    assert config.embed.visual.size_hw == (512, 512)
    assert config.embed.weights == (0.9, 0.1) and len(config.embed.templates) == 7


def test_retclip_is_as_the_paper_says():
    config = load(BuildConfig, CONFIGS / "retclip.yaml", CORPUS)
    route = config.ground.detector
    assert config.synthesize is None and "grounding-dino-base" in route.detector.model
    assert "sam_vit_b" in route.sam.model
    # One CLIP for both, with pooled features.
    assert config.embed.visual.model == config.embed.text.model
    assert "convnext_large" in config.embed.text.model and config.embed.visual.masking is None


def test_open_images_have_the_models_of_retclip():
    other = load(BuildConfig, CONFIGS / "retclip.yaml", CORPUS)
    config = load(BuildConfig, CONFIGS / "retclip_open_images.yaml")
    assert config.corpus.labels.min_confidence == 1 and config.extract_nouns.source == "labels"
    assert config.ground == other.ground and config.embed.visual == other.embed.visual
    assert config.embed.text == other.embed.text


def test_vocseg_is_as_the_paper_says():
    config = load(BuildConfig, CONFIGS / "vocseg.yaml", CORPUS)
    route = config.ground.proposals
    assert "swin-base" in route.proposer.mask_former.model
    # One CLIP matches and embeds, on crops whose background is erased.
    assert route.visual == config.embed.visual and route.text == config.embed.text
    assert route.visual.model == route.text.model and "ViT-L-14:laion2b" in route.text.model
    assert route.visual.masking == "binary" and route.visual.size_hw == (224, 224)
    assert config.reduce.prototypes.k == 10 and route.min_similarity == -1


def test_the_miniature_s_captions_are_those_of_its_grammar():
    from scene_captions import sample_captions

    lines = (CONFIGS / "miniature_captions.txt").read_text().splitlines()
    assert lines == list(dict.fromkeys(text for text, _ in sample_captions(1200, seed=0)))


def test_one_setting_of_an_evaluation_leaves_the_others_as_they_are():
    from ovref.evaluation.evaluate import EvaluateSpec

    default = load(EvaluateSpec, CONFIGS / "miniature_evaluate.yaml")
    spec = load(EvaluateSpec, CONFIGS / "miniature_evaluate.yaml", ["fossil.k=3"])
    assert (spec.fossil.k, spec.fossil.n, spec.fossil.windows) == (3, 20, None)
    assert spec.opencut == default.opencut


def test_the_licences_of_shipped_models_are_known():
    from ovref.check_models import models_of
    from ovref.licences import UNKNOWN, licence_of

    for path in BUILDS:
        config = load(BuildConfig, path, of_mine(path))
        for spec in (config.extract_nouns, config.make_images, config.embed):
            for _, model, _ in models_of(spec):
                assert licence_of(model) != UNKNOWN, model
    assert licence_of("somebody/else") == UNKNOWN
    assert licence_of("/models/sam_vit_b_01ec64.pth") == "Apache-2.0"
