"""Run: pytest tests/benchmarks/test_gpu_works.py

The check of a batch that does not fit, on a card that is not there.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gpu_works
from ovref.models.diffusion import GeneratedImage, Generator

GB = 10**9


class Card:
    """80 GB: 2 GB of weights, 0.6 an image; the allocator reserves more than tensors take."""

    def __init__(self, monkeypatch):
        self.limit, self.peak = 80 * GB, 0
        for name, function in {
            "memory_reserved": lambda: int(2.3 * GB),
            "memory_allocated": lambda: 2 * GB,
            "reset_peak_memory_stats": lambda: None,
            "max_memory_allocated": lambda: self.peak,
            "empty_cache": lambda: None,
            "get_device_properties": lambda device: SimpleNamespace(total_memory=80 * GB),
            "set_per_process_memory_fraction": self.set_fraction,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def set_fraction(self, fraction):
        self.limit = fraction * 80 * GB

    def generate(self, captions, positions, seeds):
        self.peak = int((2 + 0.6 * len(captions)) * GB)
        if self.peak > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        image_hwc = np.zeros((8, 8, 3), np.uint8)
        image = GeneratedImage(image_hwc=image_hwc, heatmaps_nhw=np.zeros((1, 1, 1)))
        return [image] * len(captions)


@pytest.mark.parametrize("batch", [4, 16, 32])
def test_the_batch_cannot_fit_and_is_halved(monkeypatch, batch):
    card, generator = Card(monkeypatch), object.__new__(Generator)
    generator._most_at_once = generator._fill_up_to = None
    generator.generate_at_once = card.generate
    found = gpu_works.starved(generator, (["a cat"] * batch, [[(2,)]] * batch, range(batch)))
    assert found["at once"] == batch // 2
    assert found["images"] == found["finite"] == batch
    assert found["GB that it may take"] < found["GB that the batch takes"]
    assert card.limit == 80 * GB
