"""`ovref check`: models of the miniature, random weights, shapes alone."""

import pytest

from ovref.config import load
from ovref.known_models import table
from ovref_pipelines import shipped
from ovref_pipelines.build_config import BuildConfig
from ovref_pipelines.verbs.check import check

DINO = "facebook/dinov3-vitl16-pretrain-lvd1689m"
SIGLIP = "google/siglip2-large-patch16-256"


def config(*overrides):
    return load(BuildConfig, shipped.find("miniature"), ["output=unused", *overrides])


def test_the_miniatures_encoders_are_compared_and_its_generator_is_run(monkeypatch):
    import ovref_pipelines.verbs.check as verb

    ran = []
    monkeypatch.setattr(verb, "check_stage", ran.append)  # a generator takes a minute
    checked = check(config())
    assert checked.problems == 0 and [spec.name for spec in ran] == ["extract_nouns", "synthesize"]
    for part in ("embed.visual: miniature:dinov2", "embed.text: miniature:clip", "Apache-2.0",
                 "ran on a blank input", "every model that was checked can be used"):  # fmt: skip
        assert part in checked.text
    assert checked.text.count("the same as") == 2


def test_shapes_load_no_weights():
    checked = check(config(), shapes=True)
    assert checked.problems == 0
    assert "16 x 16 cells of 4 pixels" in checked.text and "left out: its weights" in checked.text
    wrong = check(config("embed.visual.model=/no/such/folder"), shapes=True)
    assert wrong.problems == 1 and "CANNOT BE USED" in wrong.text


@pytest.fixture
def tiny(monkeypatch):
    """Random weights are those of tiny networks of the real classes."""
    from ovref.known_models import random_weights

    real = random_weights.write
    monkeypatch.setattr(
        random_weights, "write", lambda known, folder: real(known, folder, tiny=True)
    )


@pytest.mark.parametrize("known", table.ENCODERS, ids=[known.model for known in table.ENCODERS])
def test_each_row_of_the_table_is_checked_with_random_weights(known, tiny):
    """In each of its roles; what else the configuration names is left out."""
    overrides = ["embed.visual.size_hw=[100,157]"]
    for role in known.roles:
        overrides += [f"embed.{role}.model={known.model}", f"embed.{role}.library={known.library}"]
    checked = check(config(*overrides), random=True)
    assert checked.problems == 0, checked.text
    assert checked.text.count("the same as") == len(known.roles)
    for role in known.roles:
        assert f"embed.{role}: {known.model}" in checked.text
    assert "synthesize: miniature:stable_diffusion\n    left out" in checked.text


def test_models_of_different_rows_are_checked_together(tiny):
    checked = check(
        config(f"embed.visual.model={DINO}", f"embed.text.model={SIGLIP}",
               "embed.text.library=transformers", "embed.visual.size_hw=[64,96]"),
        random=True,
    )  # fmt: skip
    assert checked.problems == 0
    assert f"embed.visual: {DINO}" in checked.text and "DINOv3 License" in checked.text
    assert f"embed.text: {SIGLIP}" in checked.text and checked.text.count("the same as") == 2
    assert table.find("miniature:dinov2") is None
    assert table.find("ViT-L-14:laion2b_s32b_b82k").network == "ViT-L-14"


def test_random_and_shapes_exclude_each_other(capsys):
    from ovref_pipelines import cli

    with pytest.raises(SystemExit):
        cli.parse(["check", "--config", "miniature", "--random", "--shapes"])
    assert "not allowed with" in capsys.readouterr().err


def test_a_configuration_without_a_corpus_is_checked(capsys):
    from ovref_pipelines import cli

    code = cli.main(["check", "--config", "fossil", "--shapes", "embed.visual.model=/no/folder"])
    assert code == 2 and "embed.visual: /no/folder" in capsys.readouterr().out
