"""Run: pytest tests/ovref/models/test_attribution.py"""

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from attribute_images import attribute_images
from generators import generator_of
from ovref.errors import ModelError
from ovref.miniature.scenes import render
from ovref.models.attribution import PAD, Attribution, Layer, _add_second_product, noun_weights
from ovref.models.loading import load_pipeline
from ovref.models.recorders.unet import is_recorded, recording
from ovref.ops.binarisation import BinariseRule, binarise, min_max_scaled
from ovref.ops.masks import iou

CAPTIONS = ["a cat and a dog", "the zebra, the dog and the dog", "hotdog cat"]
SPANS = [
    [[(2, 5)], [(12, 15)]],
    [[(4, 9)], [(15, 18), (27, 30)], [(19, 22)]],
    [[(7, 10)]],
]
SEEDS = [1, 2, 3]


@pytest.fixture(scope="module")
def pipelines(tiny_pipelines):
    return {
        name: load_pipeline(
            str(folder), revision=None, scheduler="ddim", dtype="float32", device="cpu"
        )
        for name, folder in tiny_pipelines.items()
    }


def slow_attention(unet, run):
    """Explicit softmax of every recorded layer at every call: [layer][call] (rows, heads, p, k)."""
    queries, keys, handles = {}, {}, []
    for name in unet.attn_processors:
        if is_recorded(name):
            layer = name.removesuffix(".processor")
            attn = unet.get_submodule(layer)
            for module, store in ((attn.to_q, queries), (attn.to_k, keys)):
                hook = lambda m, i, out, s=store, n=layer: s.setdefault(n, []).append(out)  # noqa: E731
                handles.append(module.register_forward_hook(hook))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    maps = {}
    for layer in queries:
        heads = unet.get_submodule(layer).heads
        maps[layer] = []
        for query, key in zip(queries[layer], keys[layer], strict=True):
            depth = query.shape[-1] // heads
            per_head = []
            for h in range(heads):
                part = slice(h * depth, (h + 1) * depth)
                scores = query[..., part].double() @ key[..., part].double().mT / depth**0.5
                per_head.append(scores.exp() / scores.exp().sum(-1, keepdim=True))
            maps[layer].append(torch.stack(per_head, 1))
    return maps


def slow_heatmap(maps, row, tokens, latent_hw, clamp_each):
    """DAAM, one layer, head and token at a time, for one row of the batch."""
    sizes = {1: latent_hw}
    for factor in (2, 4):
        sizes[factor] = tuple((size + 1) // 2 for size in sizes[factor // 2])
    entries = []
    for calls in maps.values():
        positions = calls[0].shape[2]
        size = [hw for hw in sizes.values() if hw[0] * hw[1] == positions]
        if not size:
            continue
        for head in range(calls[0].shape[1]):
            summed = torch.zeros(size[0], dtype=torch.float64)
            for call in calls:
                for token in tokens:
                    summed += call[row, head, :, token].reshape(size[0]) / len(tokens)
            up = functional.interpolate(summed[None, None], latent_hw, mode="bicubic")[0, 0]
            entries.append(up.clamp(min=0) if clamp_each else up)
    mean = torch.stack(entries).mean(0) / len(next(iter(maps.values())))
    return mean.clamp(min=0).numpy()


def minmax(x):
    return (x - x.min()) / (x.max() - x.min())


def positions_of(pipeline):
    generator = generator_of(pipeline, steps=1, guidance=1.0, size_hw=(64, 64))
    return [generator.positions(c, s) for c, s in zip(CAPTIONS, SPANS, strict=True)]


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["unguided", "guided"])
@pytest.mark.parametrize("size_hw", [(64, 64), (64, 40), (24, 72)], ids=str)
def test_a_mixed_batch_equals_daam_done_slowly(pipelines, name, guidance, size_hw):
    pipeline = pipelines[name]
    latent_hw = (size_hw[0] // 4, size_hw[1] // 4)
    positions = positions_of(pipeline)
    generator = generator_of(pipeline, steps=2, guidance=guidance, size_hw=size_hw)
    generated = generator.generate(CAPTIONS, positions, SEEDS)

    def bare():
        pipeline(
            CAPTIONS, num_inference_steps=2, guidance_scale=guidance, output_type="latent",
            height=size_hw[0], width=size_hw[1],
            generator=[torch.Generator().manual_seed(s) for s in SEEDS],
        )  # fmt: skip

    maps = slow_attention(pipeline.unet, bare)
    first_row = len(CAPTIONS) if guidance > 1 else 0
    for b, caption_positions in enumerate(positions):
        assert generated[b].heatmaps_nhw.shape == (len(caption_positions), *latent_hw)
        for n, tokens in enumerate(caption_positions):
            fast = generated[b].heatmaps_nhw[n]
            ours = slow_heatmap(maps, first_row + b, tokens, latent_hw, clamp_each=False)
            daam = slow_heatmap(maps, first_row + b, tokens, latent_hw, clamp_each=True)
            np.testing.assert_allclose(fast, ours, atol=1e-6)
            np.testing.assert_allclose(minmax(fast), minmax(ours), atol=1e-5)
            # The published order, clamping each map: the deviation that attribution.py documents,
            # at its largest on such maps of noise, whose negative overshoots are many.
            assert np.corrcoef(fast.ravel(), daam.ravel())[0, 1] > 0.99


def test_masks_by_daams_own_order_of_clamping_are_nearly_the_same():
    """Clamping once at the end is a choice: it needs no map for each layer and head."""
    pipeline = load_pipeline(
        "miniature:stable_diffusion", revision=None, scheduler="ddim", dtype="float32", device="cpu"
    )
    generator = generator_of(pipeline, steps=4, guidance=4.0, size_hw=(64, 64))
    latent_hw = (64 // pipeline.vae_scale_factor,) * 2
    overlaps = []
    for seed in range(4):
        scene = render(seed, "validation")
        spans = [[(noun.start, noun.end)] for noun in scene.nouns]
        positions = generator.positions(scene.caption, spans)
        maps = slow_attention(
            pipeline.unet,
            lambda p=positions, c=scene.caption, s=seed: generator.generate_at_once([c], [p], [s]),
        )
        ours, daam = (
            np.stack([slow_heatmap(maps, 1, tokens, latent_hw, each) for tokens in positions])
            for each in (False, True)
        )
        masks = [binarise(min_max_scaled(h), (64, 64), BinariseRule()) for h in (ours, daam)]
        overlaps += [iou(one_hw, other_hw) for one_hw, other_hw in zip(*masks, strict=True)]
    assert 0.95 < np.mean(overlaps) < 1, np.mean(overlaps)
    assert min(overlaps) > 0.85, min(overlaps)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_batch_equals_its_captions_one_at_a_time(pipelines, name):
    pipeline = pipelines[name]
    positions = positions_of(pipeline)
    generator = generator_of(pipeline, steps=3, guidance=5.0, size_hw=(64, 40))
    together = generator.generate(CAPTIONS, positions, SEEDS)
    for b in range(len(CAPTIONS)):
        alone = generator.generate(CAPTIONS[b : b + 1], positions[b : b + 1], SEEDS[b : b + 1])[0]
        np.testing.assert_allclose(together[b].heatmaps_nhw, alone.heatmaps_nhw, atol=1e-6)
        assert np.abs(together[b].image_hwc.astype(int) - alone.image_hwc).max() <= 1


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_images_are_the_ones_generated_without_attribution(pipelines, name, guidance):
    pipeline = pipelines[name]
    generator = generator_of(pipeline, steps=2, guidance=guidance, size_hw=(64, 64))
    generated = generator.generate(CAPTIONS, positions_of(pipeline), SEEDS)
    bare = pipeline(
        CAPTIONS, num_inference_steps=2, guidance_scale=guidance, output_type="np",
        generator=[torch.Generator().manual_seed(s) for s in SEEDS],
    ).images  # fmt: skip
    for one, image in zip(generated, bare, strict=True):
        np.testing.assert_array_equal(one.image_hwc, (image * 255).round().astype(np.uint8))


def test_attention_over_all_keys_sums_to_one(pipelines):
    """A noun holding every key, times the number of keys, is 1 at each position."""
    pipeline = pipelines["sd2"]
    weights = noun_weights([[range(24)]], 24) * 24
    with torch.no_grad(), recording(pipeline.unet, weights, (16, 10)) as attribution:
        pipeline.unet(torch.randn(2, 4, 16, 10), 5, torch.randn(2, 24, 32))
    torch.testing.assert_close(attribution.heatmaps_bnhw(), torch.ones(1, 1, 16, 10))


def test_guidance_reads_the_conditional_rows_only(pipelines):
    unet = pipelines["sd2"].unet
    weights = noun_weights([[(3,)], [(4, 5)]], 24)
    torch.manual_seed(0)
    latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, 24, 32)
    with torch.no_grad(), recording(unet, weights, (16, 16)) as unguided:
        unet(latents, 5, text)
    with torch.no_grad(), recording(unet, weights, (16, 16)) as guided:
        unet(torch.cat([latents, latents]), 5, torch.cat([torch.randn(2, 24, 32), text]))
    torch.testing.assert_close(guided.heatmaps_bnhw(), unguided.heatmaps_bnhw())


def test_a_repeated_noun_is_the_mean_of_its_occurrences(pipelines):
    pipeline = pipelines["sd1"]
    generator = generator_of(pipeline, steps=2, guidance=1.0, size_hw=(64, 64))
    maps = generator.generate(["dog and dog"], [[(1,), (3,), (1, 3)]], [7])[0].heatmaps_nhw
    above = (maps > 0).all(axis=0)  # where the upsampling left nothing to clamp
    assert above.mean() > 0.9
    np.testing.assert_allclose(maps[2][above], (maps[0] + maps[1])[above] / 2, atol=1e-7)


def test_the_heatmap_does_not_grow_with_steps(pipelines):
    """A mean over steps stays a probability; buffers are as many as resolutions."""
    unet = pipelines["sd1"].unet
    weights = noun_weights([[(1,)]], 77)
    torch.manual_seed(0)
    latents, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 32)
    found = []
    for steps in (1, 5):
        with torch.no_grad(), recording(unet, weights, (16, 16)) as attribution:
            for _ in range(steps):
                unet(latents, 5, text)
        found.append(attribution.heatmaps_bnhw())
        assert sorted(sums.shape for sums in attribution._sums_bnp.values()) == [
            (1, PAD, 4 * 4), (1, PAD, 8 * 8), (1, PAD, 16 * 16)
        ]  # fmt: skip
    torch.testing.assert_close(found[0], found[1])


def test_processors_are_put_back_even_after_an_error(pipelines):
    unet = pipelines["sd1"].unet
    before = dict(unet.attn_processors)
    inside = {}
    with pytest.raises(RuntimeError, match="stop"):  # noqa: SIM117
        with recording(unet, noun_weights([[(1,)]], 77), (16, 16)):
            inside = dict(unet.attn_processors)
            raise RuntimeError("stop")
    assert unet.attn_processors == before
    exchanged = {name for name in before if inside[name] is not before[name]}
    coarse = ("down_blocks.3", "up_blocks.0")  # at a factor of 8
    assert exchanged == {n for n in before if is_recorded(n) and not n.startswith(coarse)}
    assert exchanged and not any("attn1" in name or "mid_block" in name for name in exchanged)


def test_half_precision_models_are_added_up_in_float32(pipelines, tiny_pipelines):
    exact = pipelines["sd2"]
    rough = load_pipeline(
        str(tiny_pipelines["sd2"]), revision=None, scheduler="ddim", dtype="bfloat16", device="cpu"
    )
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    found = [
        attribute_images(p, images, ["a cat"], [[(2,)]], [1, 500, 900], seed=0)
        for p in (exact, rough)
    ]
    assert found[1].dtype == np.float32
    assert np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1] > 0.99


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_attribution_of_given_images(pipelines, name):
    pipeline = pipelines[name]
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 40, 3), dtype=np.uint8)
    both = attribute_images(
        pipeline, images, ["a cat", "dog"], [[(2,)], [(1,)]], [100, 900], seed=3
    )
    assert both.shape == (2, 1, 16, 10) and both.min() >= 0 and both.max() <= 1
    maps = slow_attention(
        pipeline.unet,
        lambda: attribute_images(pipeline, images, ["a cat", "dog"], [[], []], [100, 900], seed=3),
    )
    slow = slow_heatmap(maps, 1, (1,), (16, 10), clamp_each=False)
    np.testing.assert_allclose(both[1, 0], slow, atol=1e-6)


def test_no_nouns_give_no_heatmaps(pipelines):
    generator = generator_of(pipelines["sd2"], steps=1, guidance=1.0, size_hw=(64, 64))
    assert generator.generate(["cat"], [[]], [0])[0].heatmaps_nhw.shape == (0, 16, 16)
    mixed = generator.generate(["cat", "dog"], [[], [(1,)]], [0, 1])
    assert [one.heatmaps_nhw.shape[0] for one in mixed] == [0, 1]


def test_noun_weights():
    weights = noun_weights([[(1, 3)], [(2,), ()]], 4)
    expected = torch.zeros(2, 4, 2)
    expected[0, [1, 3], 0] = 0.5
    expected[1, 2, 0] = 1.0
    assert torch.equal(weights, expected)
    assert noun_weights([], 4).shape == (0, 4, 0)
    with pytest.raises(ValueError, match=r"position 4 is not in \[0, 4\)"):
        noun_weights([[(4,)]], 4)


def test_rows_that_are_neither_captions_nor_twice_captions_are_refused():
    layers = [Layer(factor=1, heads=1, depth=8)]
    attribution = Attribution(noun_weights([[(0,)], [(0,)]], 4), (4, 4), layers)
    for rows, keys in ((3, 4), (1, 4), (6, 4), (2, 5)):
        with pytest.raises(ModelError, match="while recording 2 captions over 4"):
            key = torch.zeros(rows, 1, keys, 8)
            attribution.attend(0, torch.zeros(rows, 1, 16, 8), key, key)


def test_latents_of_another_size_are_refused(pipelines):
    unet = pipelines["sd2"].unet
    with recording(unet, noun_weights([[(1,)]], 24), (16, 16)):  # noqa: SIM117
        with pytest.raises(ModelError, match=r"160 positions .* of \(16, 16\): expected 256"):
            unet(torch.zeros(1, 4, 16, 10), 5, torch.zeros(1, 24, 32))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_only_layers_at_the_factors_count(pipelines, name):
    """Each layer's factor, derived from its name, matches its number of positions."""
    unet = pipelines[name].unet
    positions = []
    handles = [
        unet.get_submodule(n.removesuffix(".processor")).register_forward_pre_hook(
            lambda module, args, n=n: positions.append((n, args[0].shape[1]))
        )
        for n in unet.attn_processors
        if is_recorded(n)
    ]
    attribute_images(
        pipelines[name], np.zeros((1, 64, 64, 3), np.uint8), ["cat"], [[(1,)]], [500], seed=0
    )
    for handle in handles:
        handle.remove()
    before = dict(unet.attn_processors)
    for factor in (1, 2, 4, 8):
        expected = {n for n, count in positions if count == (16 // factor) ** 2}
        if not expected:
            with pytest.raises(ModelError, match=rf"at factors \({factor},\)"):
                recording(unet, noun_weights([[(1,)]], 77), (16, 16), (factor,)).__enter__()
            continue
        with recording(unet, noun_weights([[(1,)]], 77), (16, 16), (factor,)):
            inside = dict(unet.attn_processors)
        assert {n for n in before if inside[n] is not before[n]} == expected
    with pytest.raises(ModelError, match=r"no attn2.processor .* at factors \(16,\)"):
        recording(unet, noun_weights([[(1,)]], 77), (16, 16), (16,)).__enter__()


def test_a_unet_that_did_not_run_has_no_heatmaps(pipelines):
    with recording(pipelines["sd1"].unet, noun_weights([[(1,)]], 77), (16, 16)) as attribution:
        pass
    with pytest.raises(ModelError, match="no cross-attention was recorded"):
        attribution.heatmaps_bnhw()


def test_foreign_processors_are_refused(pipelines):
    from diffusers.models.attention_processor import AttnProcessor

    unet = pipelines["sd1"].unet
    before = dict(unet.attn_processors)
    unet.set_attn_processor(AttnProcessor())
    try:
        with pytest.raises(ModelError, match="expected AttnProcessor2_0"):  # noqa: SIM117
            with recording(unet, noun_weights([[(1,)]], 77), (16, 16)):
                pass
    finally:
        unet.set_attn_processor(before)


def test_the_two_ways_of_adding_agree():
    """A GPU adds by a second fused product, a CPU by the kernel's own denominators."""
    torch.manual_seed(0)
    query, key = torch.randn(4, 3, 8 * 8, 6) * 2, torch.randn(4, 3, 24, 6) * 2
    weights = noun_weights([[(1, 2, 5), (23,), ()], [tuple(range(3, 14))]], 24)
    layers = [Layer(factor=1, heads=3, depth=6)]
    one, other = (Attribution(weights, (8, 8), layers) for _ in range(2))
    for _ in range(2):
        one.attend(0, query, key, key)
        _add_second_product(other._layers[0], query[2:], key[2:])
        other._calls += 1
    torch.testing.assert_close(one.heatmaps_bnhw(), other.heatmaps_bnhw())
    expected = ((query / 6**0.5) @ key.mT).softmax(-1).mean(1)[2:] @ weights
    torch.testing.assert_close(one.heatmaps_bnhw().flatten(2).mT, expected)


def test_more_nouns_than_a_head_has_channels():
    weights = noun_weights([[(n,) for n in range(20)]], 24)
    layers = [Layer(factor=1, heads=2, depth=8)]
    one, other = (Attribution(weights, (4, 4), layers) for _ in range(2))
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 24, 8)
    one.attend(0, query, key, key)
    _add_second_product(other._layers[0], query, key)
    torch.testing.assert_close(one._sums_bnp[1], other._sums_bnp[1])


class _ReadsBack(TorchDispatchMode):
    """Notes what makes a host wait for its device: numbers read back, sizes taken from data."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.NAMES:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_while_the_unet_runs(pipelines):
    unet = pipelines["sd1"].unet
    latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 32)
    timestep = torch.tensor(5)
    with torch.no_grad(), recording(unet, noun_weights([[(1,)]], 77), (16, 16)) as attribution:
        with _ReadsBack() as watch:
            unet(latents, timestep, text)
        assert watch.found == []
        with _ReadsBack() as watch:
            attribution.heatmaps_bnhw()
        assert watch.found  # once, at the end


def compiled_and_not(folder, size_hw, guidance, **options):
    """Two batches generated by a UNet as it is and compiled; the second must not compile again."""
    found = []
    for compiled in (False, True):
        pipeline = load_pipeline(
            str(folder), revision=None, scheduler="ddim", dtype="float32", device="cpu"
        )
        positions = positions_of(pipeline)
        if compiled:
            torch._dynamo.reset()
            pipeline.unet.compile(fullgraph=True, dynamic=False, **options)
        generator = generator_of(pipeline, steps=2, guidance=guidance, size_hw=size_hw)
        generated = generator.generate(CAPTIONS, positions, SEEDS)
        with torch._dynamo.config.patch(error_on_recompile=compiled):
            generated += generator.generate(CAPTIONS[::-1], positions[::-1], SEEDS)
        found.append(generated)
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("sd1", marks=pytest.mark.slow),
        "sd2",
        pytest.param("sdxl", marks=pytest.mark.slow),
    ],
)
def test_a_recording_unet_is_one_graph(tiny_pipelines, name):
    plain, compiled = compiled_and_not(tiny_pipelines[name], (64, 40), 5.0, backend="aot_eager")
    for a, b in zip(plain, compiled, strict=True):
        np.testing.assert_allclose(a.heatmaps_nhw, b.heatmaps_nhw, atol=1e-6)
        assert np.abs(a.image_hwc.astype(int) - b.image_hwc).max() <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_compiled_unet_gives_the_same_heatmaps(tiny_pipelines, guidance):
    plain, compiled = compiled_and_not(tiny_pipelines["sd2"], (64, 40), guidance)
    for a, b in zip(plain, compiled, strict=True):
        np.testing.assert_allclose(a.heatmaps_nhw, b.heatmaps_nhw, atol=1e-5)
        assert np.abs(a.image_hwc.astype(int) - b.image_hwc).max() <= 1
