"""What the tables need is built in order, once, and not at all if a setting is wrong."""

from dataclasses import dataclass

import pytest
import yaml

import run_paper_tables
from ovref.config import load
from ovref.errors import ConfigError
from ovref_pipelines import recipe
from paper_tables import tables
from paper_tables.builds import build_missing
from paper_tables.spec import BuildFirst, TablesSpec

BUILD = {
    "output": "first",
    "corpus": {"path": "captions.txt"},
    "synthesize": {"model": "miniature:stable_diffusion", "size_hw": [64, 64]},
    "embed": {"visual": {"model": "miniature:dinov2"}, "text": {"model": "miniature:clip"}},
}


@dataclass
class Built:
    quarantined: int


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Runs in a folder with a configuration; outputs that `recipe.build` was asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(BUILD))
    outputs = []

    def build(config, say):
        outputs.append(config.output)
        if config.output == "broken":
            return Built(2)
        recipe.output_of(config).collection.write("collection.json", b"{}")
        return Built(0)

    monkeypatch.setattr(recipe, "build", build)
    return outputs


def of(output):
    return BuildFirst(config="build.yaml", overrides=(f"output={output}",))


def test_what_is_missing_is_built_in_order_and_once(built):
    builds = [of("a"), of("b")]
    assert build_missing(builds, print) == 0 and built == ["a", "b"]
    assert build_missing([*builds, of("c")], print) == 0 and built == ["a", "b", "c"]


def test_nothing_follows_a_build_that_failed(built):
    assert build_missing([of("broken"), of("a")], print) == 2 and built == ["broken"]


def test_a_wrong_setting_is_reported_before_anything_is_built(built):
    with pytest.raises(ConfigError, match="unknown key shard_sise"):
        build_missing(
            [of("a"), BuildFirst(config="build.yaml", overrides=("shard_sise=3",))], print
        )
    assert built == []


def test_the_command_builds_first_and_then_measures(built, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(tables, "make_tables", lambda spec, say: asked.append(spec))
    names = ("fossil", "vocseg_binary", "vocseg_heatmap", "vocseg_none", "retclip")
    spec = {
        "output": "tables",
        "collections": dict.fromkeys(names, "a/collection"),
        "builds": [{"config": "build.yaml", "overrides": ["output=a"]}],
    }
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables.yaml").write_text(yaml.safe_dump(spec))
    assert run_paper_tables.main(["--config", "tables.yaml", "scenes=7"]) == 0
    assert built == ["a"] and asked == [load(TablesSpec, "tables.yaml", ["scenes=7"])]
    assert run_paper_tables.main(["--config", "tables.yaml", "builds=[{config: build.yaml, "
                     "overrides: [output=broken]}]"]) == 1  # fmt: skip
    assert len(asked) == 1 and "failed permanently" in capsys.readouterr().err


def test_the_shipped_recipe_builds_the_collections_that_it_asks():
    spec = load(TablesSpec, "configs/miniature_tables.yaml")
    configs = [load(recipe.BuildConfig, first.config, first.overrides) for first in spec.builds]
    made = {f"{config.output}/collection": config for config in configs}
    asked = spec.collections
    assert set(made) == set(vars(asked).values()) and len(made) == 5
    for masking in ("binary", "heatmap", "none"):
        config = made[getattr(asked, f"vocseg_{masking}")]
        assert config.embed.visual.masking == masking
        assert config.images_from in (None, "runs/miniature_vocseg")
    assert made[asked.fossil].synthesize is not None and made[asked.retclip].ground is not None
