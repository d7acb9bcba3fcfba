"""A small model and its data for tests of the training loop; run as a program, it trains them.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python training_fakes.py FOLDER
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass
class Numbers:
    """A batch: sums of inputs are wanted."""

    names: tuple
    inputs: torch.Tensor
    wanted: torch.Tensor


class Model(nn.Module):
    """Two layers, the outer one linear."""

    def __init__(self, hidden, dropout):
        super().__init__()
        self.inner = nn.Linear(3, hidden)
        self.drop = nn.Dropout(dropout)
        self.outer = nn.Linear(hidden, 1)

    def forward(self, inputs):
        return self.outer(self.drop(torch.tanh(self.inner(inputs))))


def new_model(hidden=5, dropout=0.0, frozen=(), same_outer=False):
    torch.manual_seed(0)
    model = Model(hidden, dropout)
    if same_outer:  # only the inner layer has another width
        model.outer = nn.Linear(5, 1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)))
    return model


def batches(step, part, parts):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(4, 3, generator=generator)
    rows = list(range(4))[part * 4 // parts : (part + 1) * 4 // parts]
    names = tuple(f"image {4 * step + row}" for row in rows)
    return Numbers(names, inputs[rows], inputs[rows].sum(1, keepdim=True))


def losses_of(model, batch):
    time.sleep(float(os.environ.get("SLEEP", 0)))
    found = model(batch.inputs)
    return {
        "square": (found - batch.wanted).square().sum(1),
        "size": 0.0 * found.abs().sum(1),
    }


def fresh():
    return Path(tempfile.mkdtemp())


if __name__ == "__main__":
    from ovref.storage.file_store import Store
    from ovref.training.loop import train
    from ovref.training.settings import TrainingConfig

    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    train(
        new_model(), losses_of, batches,
        TrainingConfig(steps=8, batch=4, rate=0.05, save_every=3, log_every=2, decay=0.1),
        Store.open(sys.argv[1]), identity={"data": "fake"},
    )  # fmt: skip
    if "RANK" in os.environ:
        torch.distributed.destroy_process_group()
