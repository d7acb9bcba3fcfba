"""A CLIP-RC on the miniature's CLIP that was trained for a few steps: shared by several tests."""

from dataclasses import replace

import pytest

from ovref.training.labelled_batches import TrainingData
from ovref.training.settings import TrainingConfig
from ovref.training.train_clip_rc import ClipRcTraining, run
from ovref_inference.segmenters.clip_rc_config import ClipRcNetworkConfig

UNSEEN = ("car", "mushroom", "balloon")
SPEC = ClipRcTraining(
    output="",
    data=TrainingData(scenes=40, unseen=UNSEEN, short_side=64, scale=(1.0, 1.2), threads=1),
    network=ClipRcNetworkConfig(
        model="miniature:clip", size_hw=(64, 64), regions=4, prompts=2, layers=1, heads=4, ffn=32
    ),
    training=TrainingConfig(steps=4, batch=4, rate=1e-3, save_every=4, log_every=2),
    device="cpu",
)


def spec_at(folder, **changes):
    return replace(SPEC, output=str(folder), **changes)


@pytest.fixture(scope="session")
def trained_head(tmp_path_factory):
    """Output of an inductive training."""
    folder = tmp_path_factory.mktemp("trained_head")
    run(spec_at(folder), lambda line: None)
    return folder
