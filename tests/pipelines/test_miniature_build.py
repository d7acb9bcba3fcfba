"""The real stages with the miniature's models: any engine and number of workers, the same bytes."""

from pathlib import Path

import pytest
from ovref_pipelines import recipe, show
from ovref_pipelines.recipe import BuildConfig
from pipeline_fakes import files_of

from ovref.config import load

CONFIGS = Path(__file__).parents[2] / "configs"
CORPUS = f"corpus.path={CONFIGS / 'miniature_captions.txt'}"
SMALL = (CORPUS, "corpus.limit=10", "shard_size=4", "synthesize.steps=2", "synthesize.batch_size=3")


@pytest.mark.slow
def test_engines_and_numbers_of_workers_agree_to_the_byte(local_ray, tmp_path):
    engines = {
        "local": ("engine.engine=local", "engine.workers=1"),
        "ray1": ("engine.engine=ray", "engine.workers=1"),
        "ray3": ("engine.engine=ray", "engine.workers=3"),
    }
    files, fingerprints = {}, {}
    for name, engine in engines.items():
        output = f"output={tmp_path / name}"
        config = load(BuildConfig, CONFIGS / "miniature.yaml", [*SMALL, *engine, output])
        fingerprints[name] = recipe.build(config).collection["fingerprint"]
        folders = recipe.open_steps(config, create=False)
        steps = [getattr(folders, step) for step in show.STEPS]
        files[name] = {step.name: files_of(step) for step in steps if step is not None}
    assert files["local"]["references"]
    assert files["local"] == files["ray1"] == files["ray3"]
    assert len(set(fingerprints.values())) == 1
