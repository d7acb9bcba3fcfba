"""The real stages with the miniature's models: any engine and number of workers, the same bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline_fakes import files_of

from ovref.config import load
from ovref.miniature.scenes import render
from ovref.miniature.shapes import CLASSES
from ovref.records import YES
from ovref_pipelines import recipe
from ovref_pipelines.output import STEPS
from ovref_pipelines.recipe import BuildConfig

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
        folders = recipe.open_steps(config)
        steps = [getattr(folders, step) for step in STEPS]
        files[name] = {step.name: files_of(step) for step in steps if step is not None}
    assert files["local"]["references"]
    assert files["local"] == files["ray1"] == files["ray3"]
    assert len(set(fingerprints.values())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_every_line_of_a_build_in_json_is_json(tmp_path, engine):
    settings = [*SMALL, f"engine.engine={engine}", "engine.workers=1", f"output={tmp_path}"]
    command = [sys.executable, "-W", "default", "-m", "ovref_pipelines", "build"]
    done = subprocess.run(
        [*command, "--config", "miniature", "engine.log=json", *settings],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in (done.stdout + done.stderr).splitlines()]
    assert done.returncode == 0 and lines[-1]["time"]
    assert {"build", "progress", "result"} <= {line["event"] for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least_iou"), [("miniature_retclip", 0.4), ("miniature_vocseg", 0.1)]
)
def test_scenes_with_their_captions_become_a_collection(tmp_path, name, least_iou):
    small = ("corpus.limit=24", "shard_size=8", "engine.engine=local", "engine.workers=1")
    config = load(BuildConfig, CONFIGS / f"{name}.yaml", [*small, f"output={tmp_path}"])
    summary = recipe.build(config)
    assert summary.ingested.captions == 24 and summary.quarantined == 0
    assert summary.collection["added"] == summary.steps[-1].outputs >= 24
    ious = []
    folders = recipe.open_steps(config)
    for shard in folders.images.committed():
        for record in folders.images.read(shard):
            scene = render(int(record.source.rpartition(":")[2]), "train")
            assert scene.caption == record.caption
            for region in record.regions:
                if region.noun.text in CLASSES:
                    true_hw = scene.label_hw == CLASSES.index(region.noun.text)
                    mask_hw = region.mask_hw == YES
                    ious.append((true_hw & mask_hw).sum() / (true_hw | mask_hw).sum())
    assert len(ious) >= 24 and sum(ious) / len(ious) > least_iou
