"""Run: pytest tests/ovref/models/test_joint_attribution.py"""

import gc
import weakref

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend

from ovref.errors import ModelError
from ovref.models.joint_attribution import (
    PAD,
    JointAttribution,
    Layout,
    attention_by,
    recording,
)
from ovref.models.recorders.flux import Flux2Recorder, FluxRecorder
from ovref.models.recorders.pixart_sana import PixArtRecorder, SanaRecorder
from ovref.models.recorders.qwen_image import QwenImageRecorder
from ovref.models.recorders.recorder import window
from ovref.models.recorders.sd3 import SD3Recorder
from ovref.models.recorders.z_image import ZImageRecorder

POSITIONS = [[(1, 2, 5), (7,), ()], [tuple(range(3, 14))]]
FIRST = Layout(image="first")


def inputs(rows, queries, keys, heads=3, depth=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(rows, heads, length, depth, generator=generator) * 2
        for length in (queries, keys, keys)
    )


def shares(query, key, mask=None):
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).mean(1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_the_share_is_the_mean_of_softmax_attention(masked, guided):
    rows = 4 if guided else 2
    query, key, value = inputs(rows, 16 + 20, 16 + 20)
    mask = None
    if masked:
        mask = torch.ones(rows, 1, 1, 36, dtype=torch.bool)
        mask[1, ..., 32:] = mask[-1, ..., 30:] = False
    attribution = JointAttribution(POSITIONS, (2, 8), FIRST, "share")
    for _ in range(2):
        output = attribution.attend(query, key, value, mask)
    expected = functional.scaled_dot_product_attention(query, key, value, mask)
    assert torch.equal(output, expected)
    maps = attribution.heatmaps_bnhw()
    assert maps.shape == (2, 3, 2, 8)
    attention = shares(query, key, mask)[-2:, :16, 16:]
    for b, nouns in enumerate(POSITIONS):
        for n, noun in enumerate(nouns):
            wanted = attention[b][:, list(noun)].mean(1) if noun else torch.zeros(16)
            torch.testing.assert_close(maps[b, n].flatten(), wanted)


@pytest.mark.parametrize("shape", [None, (4, 1, 1, 36), (1, 1, 1, 36), (4, 3, 36, 36)])
def test_the_two_ways_of_adding_agree(shape):
    """A GPU adds by a second fused product, a CPU by the kernel's own denominators."""
    query, key, value = inputs(4, 36, 36)
    mask = None
    if shape is not None:
        mask = torch.ones(shape, dtype=torch.bool)
        mask[..., 33:] = False
    one, other = (JointAttribution(POSITIONS, (2, 8), FIRST, "share") for _ in range(2))
    one.attend(query, key, value, mask)
    own = slice(2, 4)
    if mask is not None:
        mask = mask if len(mask) == 1 else mask[own]
        mask = mask if mask.shape[2] == 1 else mask[:, :, :16]
    other._add_second_product(query[own, :, :16], key[own], 16, mask, None)
    other._maps += 3
    torch.testing.assert_close(one.heatmaps_bnhw(), other.heatmaps_bnhw())


@pytest.mark.parametrize(
    ("chosen", "depth", "has_denominators"),
    [
        (SDPBackend.CUDNN_ATTENTION, 64, True),
        (SDPBackend.FLASH_ATTENTION, 64, True),
        (SDPBackend.FLASH_ATTENTION, 12, False),
        (SDPBackend.EFFICIENT_ATTENTION, 64, False),
        (SDPBackend.MATH, 64, False),
    ],
)
def test_the_operators_behind_attention_on_a_gpu_return_denominators(
    chosen, depth, has_denominators
):
    """Without a GPU only their shapes can be asked for."""
    query, key, value = (
        torch.empty(2, 3, length, depth, device="meta", dtype=torch.bfloat16)
        for length in (16, 36, 36)
    )
    found = attention_by(chosen, query, key, value, scale=0.5)
    assert (found is not None) == has_denominators
    if found is not None:
        output, log_sums = found
        assert output.shape == (2, 3, 16, depth) and log_sums.shape == (2, 3, 16)
        assert log_sums.dtype == torch.float32


def test_the_output_is_the_product_of_outputs_above_its_smallest():
    query, key, value = inputs(4, 36, 36)
    attribution = JointAttribution(POSITIONS, (2, 8), Layout(image="last"), "output")
    output = attribution.attend(query, key, value)
    assert torch.equal(output, functional.scaled_dot_product_attention(query, key, value))
    rows = output[2:].transpose(1, 2).flatten(2)
    maps = attribution.heatmaps_bnhw().flatten(2)
    wanted = rows[0, 20:] @ rows[0, [1, 2, 5]].mean(0)
    torch.testing.assert_close(maps[0, 0], wanted - wanted.min())
    assert maps.min() == 0 and not maps[0, 2].any()


@pytest.mark.parametrize("reading", ["share", "output"])
def test_what_is_kept_does_not_grow_with_blocks_and_steps(reading):
    """Neither in tensors nor in their sizes, and no tensor of the network stays alive."""
    attribution = JointAttribution(POSITIONS, (2, 8), FIRST, reading)
    sizes = []
    for calls in (1, 40):
        for call in range(calls):
            tensors = inputs(2, 36, 36, seed=call)
            alive = [weakref.ref(tensor) for tensor in tensors]
            alive.append(weakref.ref(attribution.attend(*tensors)))
            del tensors
        held = [t for t in vars(attribution).values() if isinstance(t, torch.Tensor)]
        sizes.append(sorted(tuple(t.shape) for t in held))
        gc.collect()
        assert not any(reference() is not None for reference in alive)
    assert sizes[0] == sizes[1]
    assert (2, PAD, 16) in sizes[0] and len(sizes[0]) == 4


def test_half_precision_is_added_up_in_float32():
    query, key, value = inputs(2, 36, 36)
    for reading in ("share", "output"):
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            attribution = JointAttribution(POSITIONS, (2, 8), FIRST, reading)
            attribution.attend(query.to(dtype), key.to(dtype), value.to(dtype))
            found.append(attribution.heatmaps_bnhw()[0, 0].flatten())
        assert found[1].dtype == torch.float32
        assert torch.corrcoef(torch.stack(found))[0, 1] > 0.99


def test_captions_without_nouns():
    attribution = JointAttribution([[], []], (2, 8), FIRST, "share")
    attribution.attend(*inputs(2, 36, 36))
    assert attribution.heatmaps_bnhw().shape == (2, 0, 2, 8)


@pytest.mark.parametrize(
    ("layout", "shape", "named"),
    [
        (FIRST, (3, 36, 36), "attention of 3 rows while recording 2 captions"),
        (FIRST, (2, 16, 36), "attention of 16 queries over 36 keys"),
        (FIRST, (2, 28, 28), "nouns up to token 13"),
        (Layout(image="last"), (2, 28, 28), "nouns up to token 13"),
        (Layout(image="queries"), (2, 36, 36), "is not laid out as expected"),
        (Layout(image="queries"), (2, 16, 12), "nouns up to token 13"),
    ],
    ids=str,
)
def test_attention_that_does_not_belong_to_the_captions_is_refused(layout, shape, named):
    attribution = JointAttribution(POSITIONS, (2, 8), layout, "share")
    with pytest.raises(ModelError, match=named):
        attribution.attend(*inputs(*shape))


def test_attention_that_cannot_be_read_is_refused():
    attribution = JointAttribution(POSITIONS, (2, 8), FIRST, "share")
    for option in ({"is_causal": True}, {"dropout_p": 0.1}, {"enable_gqa": True}):
        with pytest.raises(ModelError, match="cannot be recorded"):
            attribution.attend(*inputs(2, 36, 36), **option)
    with pytest.raises(ModelError, match="no attention was recorded"):
        attribution.heatmaps_bnhw()


class Network(torch.nn.Module):
    """Two attentions, whose forward takes what it attends over."""

    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList(Attends() for _ in range(2))

    def forward(self, *tensors):
        return [part(*tensors) for part in self.parts]


class Attends(torch.nn.Module):
    def forward(self, query, key, value):
        return functional.scaled_dot_product_attention(query, key=key, value=value)


def test_only_chosen_modules_and_calls_are_recorded():
    network = Network()
    found = {}
    for chosen, counted in (((0,), [True]), ((1,), [True]), ((0, 1), [False, True, False])):
        attribution = JointAttribution(POSITIONS, (2, 8), FIRST, "share")
        parts = [network.parts[number] for number in chosen]
        with recording(network, parts, attribution, counted):
            assert "forward" in vars(parts[0])
            for call in range(len(counted)):
                network(*inputs(2, 36, 36, seed=call))
        found[chosen] = int(attribution._maps)
    assert found == {(0,): 3, (1,): 3, (0, 1): 6}
    assert not any("forward" in vars(part) for part in network.parts)
    assert not network._forward_pre_hooks


def test_everything_is_put_back_after_an_error():
    network = Network()
    mine = network.parts[1].forward = lambda *tensors: None  # as of offloading
    attribution = JointAttribution(POSITIONS, (2, 8), FIRST, "share")
    with pytest.raises(RuntimeError, match="stop"):  # noqa: SIM117
        with recording(network, list(network.parts), attribution, [True]):
            raise RuntimeError("stop")
    assert "forward" not in vars(network.parts[0]) and network.parts[1].forward is mine
    assert not network._forward_pre_hooks


def test_another_number_of_calls_than_expected_is_an_error():
    network = Network()
    attribution = JointAttribution(POSITIONS, (2, 8), FIRST, "share")
    with pytest.raises(ModelError, match="Network ran 1 times for a batch of images, expected 3"):  # noqa: SIM117
        with recording(network, list(network.parts), attribution, [True, False, True]):
            network(*inputs(2, 36, 36))


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    [
        ((0.0, 1.0), 3, [0, 1, 2]),
        ((8 / 28, 9 / 28), 28, [8]),
        ((8 / 28, 9 / 28), 4, [1]),
        ((15 / 19, 1.0), 19, [15, 16, 17, 18]),
        ((0.7, 1.0), 28, list(range(19, 28))),
        ((0.7, 1.0), 1, [0]),
        ((0.99, 1.0), 2, [1]),
    ],
)
def test_windows(share, count, expected):
    assert list(window(share, count)) == expected


def sd3_5_medium():
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        num_layers=1, attention_head_dim=64, num_attention_heads=24, caption_projection_dim=1536,
        pos_embed_max_size=384, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 16, 128, 128), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 333, 4096),
        "pooled_projections": torch.randn(1, 2048),
    }  # fmt: skip
    return network, given, network.transformer_blocks[0].attn, SD3Recorder, 4096


def flux_1():
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel(num_layers=1, num_single_layers=0)
    ids = torch.zeros(4096, 3)
    ids[:, 1], ids[:, 2] = torch.arange(4096) // 64, torch.arange(4096) % 64
    given = {
        "hidden_states": torch.randn(1, 4096, 64), "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 512, 4096), "img_ids": ids,
        "txt_ids": torch.zeros(512, 3), "pooled_projections": torch.randn(1, 768),
    }  # fmt: skip
    return network, given, network.transformer_blocks[0].attn, FluxRecorder, 0


def flux_2_klein():
    """FLUX.2-klein-4B at 512 x 512 pixels; its feed-forward nets, not read here, are narrow."""
    from diffusers import Flux2Transformer2DModel

    network = Flux2Transformer2DModel(
        num_layers=1, num_single_layers=0, num_attention_heads=24, joint_attention_dim=7680,
        guidance_embeds=False, mlp_ratio=0.01,
    )  # fmt: skip
    ids, txt_ids = torch.zeros(1, 1024, 4), torch.zeros(1, 512, 4)
    ids[..., 1], ids[..., 2] = torch.arange(1024) // 32, torch.arange(1024) % 32
    txt_ids[..., 3] = torch.arange(512)
    given = {
        "hidden_states": torch.randn(1, 1024, 128), "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 512, 7680), "img_ids": ids, "txt_ids": txt_ids,
    }  # fmt: skip
    return network, given, network.transformer_blocks[0].attn, Flux2Recorder, 0


def pixart_sigma():
    from diffusers import PixArtTransformer2DModel

    network = PixArtTransformer2DModel(
        num_layers=1, caption_channels=4096, use_additional_conditions=False
    )
    mask = torch.ones(1, 300)
    mask[:, 30:] = 0
    given = {
        "hidden_states": torch.randn(1, 4, 128, 128), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 300, 4096), "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip
    return network, given, network.transformer_blocks[0].attn2, PixArtRecorder, 0


def sana_600m():
    from diffusers import SanaTransformer2DModel

    network = SanaTransformer2DModel(
        num_layers=1, num_attention_heads=36, num_cross_attention_heads=16,
        cross_attention_head_dim=72, cross_attention_dim=1152,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 32, 32, 32), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 300, 2304),
        "encoder_attention_mask": torch.ones(1, 300),
    }  # fmt: skip
    return network, given, network.transformer_blocks[0].attn2, SanaRecorder, 0


def qwen_image():
    from diffusers import QwenImageTransformer2DModel

    network = QwenImageTransformer2DModel(num_layers=1)
    mask = torch.ones(1, 60, dtype=torch.int64)
    mask[:, 40:] = 0
    given = {
        "hidden_states": torch.randn(1, 4096, 64), "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 60, 3584), "encoder_hidden_states_mask": mask,
        "img_shapes": [[(1, 64, 64)]],
    }  # fmt: skip
    return network, given, network.transformer_blocks[0].attn, QwenImageRecorder, 0


def z_image():
    from diffusers import ZImageTransformer2DModel

    network = ZImageTransformer2DModel(n_layers=1, n_refiner_layers=0)
    torch.nn.init.zeros_(network.x_pad_token)
    torch.nn.init.zeros_(network.cap_pad_token)
    given = {
        "x": [torch.randn(16, 1, 128, 128)], "t": torch.tensor([0.5]),
        "cap_feats": [torch.randn(40, 2560)],
    }  # fmt: skip
    return network, given, network.layers[0].attention, ZImageRecorder, 4096


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [sd3_5_medium, flux_1, flux_2_klein, pixart_sigma, sana_600m, qwen_image, z_image]
)
def test_a_block_of_the_real_size_equals_explicit_softmax(family):
    """Real numbers of heads, channels and tokens, random weights, one block. `output` for FLUX.2,
    whose default it is; `share` for the others."""
    torch.manual_seed(0)
    network, given, attn, recorder, text = family()
    network.eval()
    side = 32 if family in (sana_600m, flux_2_klein) else 64
    count, noun = side * side, (5, 6, 17)
    seen = []
    attend = functional.scaled_dot_product_attention

    def keep(query, key, value, attn_mask=None, **options):
        seen.append((query, key, value, attn_mask))
        return attend(query, key, value, attn_mask=attn_mask, **options)

    reading = "output" if family is flux_2_klein else "share"
    attribution = JointAttribution([[noun]], (side, side), recorder.layout, reading)
    with torch.no_grad():
        with recording(network, [attn], attribution, [True]):
            network(**given)
        hooks = [
            attn.register_forward_pre_hook(
                lambda *_: setattr(functional, "scaled_dot_product_attention", keep)
            ),
            attn.register_forward_hook(
                lambda *_: setattr(functional, "scaled_dot_product_attention", attend)
            ),
        ]
        network(**given)
        for hook in hooks:
            hook.remove()
    ((query, key, value, mask),) = seen
    image = query.shape[2] - count if recorder.layout.image == "last" else 0
    tokens = [text + token for token in noun]
    found = attribution.heatmaps_bnhw()[0, 0]
    if reading == "output":
        rows = torch.cat([torch.arange(image, image + count), torch.tensor(tokens)])
        products = torch.zeros(count, dtype=torch.float64)
        for head in range(query.shape[1]):
            q, k, v = (each[0, head].double() for each in (query, key, value))
            outputs = (q[rows] @ k.mT / q.shape[1] ** 0.5).softmax(-1) @ v
            products += outputs[:count] @ outputs[count:].mean(0)
        expected = (products - products.min()).unflatten(0, (side, side))
        gap = (found - expected).abs().max() / expected.max()
        assert 0 < float(gap) < 2e-5
        return
    total = torch.zeros(count, dtype=torch.float64)
    for head in range(query.shape[1]):
        scores = query[0, head, image : image + count] @ key[0, head].mT / query.shape[3] ** 0.5
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask[0, 0], -torch.inf)
        elif mask is not None:
            scores = scores + mask[0, min(head, mask.shape[1] - 1)]
        total += scores.softmax(-1)[:, tokens].double().mean(1)
    expected = (total / query.shape[1]).unflatten(0, (side, side)).float()
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=2e-4)
