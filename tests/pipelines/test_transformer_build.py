"""A build whose images come from a diffusion transformer with random weights.

Run: pytest tests/pipelines/test_transformer_build.py
"""

from pathlib import Path

import numpy as np
import pytest

import tiny_transformers
from ovref.check_models import check_models
from ovref.config import load
from ovref.errors import ModelError
from ovref_pipelines import recipe
from ovref_pipelines.recipe import BuildConfig

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def config_of(tmp_path_factory):
    model = tiny_transformers.sd3(tmp_path_factory.mktemp("models") / "sd3")

    def config(output, *settings):
        return load(BuildConfig, CONFIGS / "miniature.yaml", [
            f"corpus.path={CONFIGS / 'miniature_captions.txt'}", "corpus.limit=6", "shard_size=4",
            f"synthesize.model={model}", "synthesize.scheduler=flow_euler", "synthesize.steps=2",
            "synthesize.factors=[1,2,4]", "synthesize.batch_size=3", "synthesize.min_area=0.0",
            "synthesize.max_area=1.0", "engine.engine=local", "engine.workers=1",
            f"output={output}", *settings,
        ])  # fmt: skip

    return config


def test_captions_become_images_heatmaps_and_references(config_of, tmp_path):
    config = config_of(tmp_path, "synthesize.read_steps=[0.0,1.0]", "synthesize.blocks=[1,2]")
    summary = recipe.build(config)
    assert summary.quarantined == 0 and summary.collection["added"] >= 6
    images = recipe.open_steps(config).images
    records = [record for shard in images.committed() for record in images.read(shard)]
    assert len(records) >= 4
    for record in records:
        assert record.image_hwc().shape == (64, 64, 3)
        assert record.heatmaps_nhw.shape == (len(record.regions), 8, 8)
        assert record.heatmaps_nhw.dtype == np.float16 and record.heatmaps_nhw.max() == 1
        assert all(region.mask_hw.shape == (64, 64) for region in record.regions)
        assert {region.source for region in record.regions} == {"daam"}
        assert record.provenance["reading"] == "share"
        assert record.provenance["blocks"] == [1, 2]
        assert record.provenance["scheduler"] == "flow_euler"


def test_a_setting_that_the_generator_cannot_meet_is_found_before_the_build(config_of, tmp_path):
    config = config_of(tmp_path, "synthesize.blocks=[9]")
    with pytest.raises(ModelError, match="has blocks 0 to 3, found blocks"):
        check_models([config.synthesize])
    products = config_of(tmp_path, "synthesize.reading=output")
    assert [model.setting for model in check_models([products.synthesize])] == ["model"]
