"""Run: pytest tests/benchmarks/test_attribution_without_a_gpu.py

What of a GPU can be shown without one: full-size UNets in half precision on fake CUDA tensors,
which have shapes, types and devices but no values. Mixed devices and types are refused as on a
card, and reading a number back cannot be done.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from bench import presets
from ovref.models import attribution
from ovref.models.attribution import Attribution, Layer, noun_weights
from ovref.models.recorders.unet import recording

WEIGHTS = noun_weights([[(1, 2), (5,)], [(3,)]], 77)
CAPTIONS = len(WEIGHTS)


@pytest.fixture
def fake(monkeypatch):
    """Fake tensors; what is read of the weights before anything runs is given."""
    used = attribution._used_positions(WEIGHTS)
    monkeypatch.setattr(attribution, "_used_positions", lambda weights: used)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


def on_gpu(*shape, dtype):
    return torch.zeros(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize(
    ("preset", "dtype", "layers"),
    [("sd15", torch.bfloat16, 15), ("sd21", torch.float16, 15), ("sdxl", torch.bfloat16, 60)],
)
def test_a_full_size_unet_records(fake, monkeypatch, preset, dtype, layers, guided):
    ways = []
    second = attribution._add_second_product
    monkeypatch.setattr(
        attribution, "_add_second_product", lambda *args: (ways.append(1), second(*args))
    )
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            unet = presets.unet(preset)
    finally:
        torch.set_default_dtype(torch.float32)
    rows, side = CAPTIONS * (1 + guided), unet.config.sample_size
    conditioning = {}
    if preset == "sdxl":
        conditioning = {
            "text_embeds": on_gpu(rows, 1280, dtype=dtype),
            "time_ids": on_gpu(rows, 6, dtype=dtype),
        }
    with recording(unet, WEIGHTS, (side, side)) as found:
        output = unet(
            on_gpu(rows, 4, side, side, dtype=dtype),
            on_gpu(dtype=torch.int64),
            on_gpu(rows, 77, unet.config.cross_attention_dim, dtype=dtype),
            added_cond_kwargs=conditioning,
        ).sample
    assert output.shape == (rows, 4, side, side) and output.device.type == "cuda"
    assert len(ways) == layers
    for factor, sums in found._sums_bnp.items():
        assert sums.shape == (CAPTIONS, 8, (side // factor) ** 2)
        assert (sums.device.type, sums.dtype) == ("cuda", torch.float32)
    with pytest.raises(DataDependentOutputException):
        found.heatmaps_bnhw()  # the one place that reads a number back


def test_tensors_left_on_the_host_would_be_found(fake):
    layers = [Layer(factor=1, heads=2, depth=64)]
    left = Attribution(WEIGHTS, (8, 8), layers, dtype=torch.float16, device="cpu")
    query, key = (on_gpu(CAPTIONS, 2, n, 64, dtype=torch.float16) for n in (64, 77))
    with pytest.raises(RuntimeError, match="device"):
        left.attend(0, query, key, key)
