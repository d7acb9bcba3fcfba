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
from ovref.models.joint_attribution import JointAttribution
from ovref.models.joint_attribution import recording as recording_jointly
from ovref.models.recorders.flux import FluxRecorder
from ovref.models.recorders.sd3 import SD3Recorder
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


def sd3_5_medium():
    """Network, what it takes for two captions at 1024 pixels, its recorder, rows."""
    import diffusers

    network = diffusers.SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    )  # fmt: skip
    given = {
        "hidden_states": on_gpu(4, 16, 128, 128, dtype=torch.bfloat16),
        "timestep": on_gpu(4, dtype=torch.float32),
        "encoder_hidden_states": on_gpu(4, 333, 4096, dtype=torch.bfloat16),
        "pooled_projections": on_gpu(4, 2048, dtype=torch.bfloat16),
    }
    return network, given, SD3Recorder, [block.attn for block in network.transformer_blocks]


def flux_1_dev():
    """As `sd3_5_medium`, without guidance twins."""
    import diffusers

    network = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    given = {
        "hidden_states": on_gpu(2, 4096, 64, dtype=torch.bfloat16),
        "timestep": on_gpu(2, dtype=torch.bfloat16), "guidance": on_gpu(2, dtype=torch.float32),
        "encoder_hidden_states": on_gpu(2, 512, 4096, dtype=torch.bfloat16),
        "pooled_projections": on_gpu(2, 768, dtype=torch.bfloat16),
        "img_ids": on_gpu(4096, 3, dtype=torch.bfloat16),
        "txt_ids": on_gpu(512, 3, dtype=torch.bfloat16),
    }  # fmt: skip
    blocks = [*network.transformer_blocks, *network.single_transformer_blocks]
    return network, given, FluxRecorder, [block.attn for block in blocks]


@pytest.mark.parametrize("reading", ["share", "output"])
@pytest.mark.parametrize("family", [sd3_5_medium, flux_1_dev])
def test_a_full_size_transformer_records(monkeypatch, family, reading):
    """All blocks are read into one buffer; nothing is read back before the end."""
    seconds = []
    add = JointAttribution._add_second_product
    monkeypatch.setattr(
        JointAttribution, "_add_second_product", lambda *args: (seconds.append(1), add(*args))
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), torch.no_grad():
            with torch.device("cuda"):
                network, given, recorder, attentions = family()
            torch.set_default_dtype(torch.float32)
            found = JointAttribution(
                [[(1, 2), (5,)], [(3,)]], (64, 64), recorder.layout, reading, device="cuda"
            )
            with recording_jointly(network, attentions, found, [True]):
                output = network(**given, return_dict=False)[0]
            assert output.device.type == "cuda"
            assert len(seconds) == (len(attentions) if reading == "share" else 0)
            sums = found._sums_bnp
            assert sums.shape == (2, 8, 4096)
            assert (sums.device.type, sums.dtype) == ("cuda", torch.float32)
            with pytest.raises(DataDependentOutputException):
                found.heatmaps_bnhw()  # the one place that reads a number back
    finally:
        torch.set_default_dtype(torch.float32)
