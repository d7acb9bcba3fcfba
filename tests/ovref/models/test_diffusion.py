"""Run: pytest tests/ovref/models/test_diffusion.py"""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from generators import generator_of
from ovref.models.attribution import noun_weights
from ovref.models.loading import load_pipeline, optimize_pipeline
from ovref.models.recorders.unet import recording
from ovref.models.schedulers import SCHEDULERS

OPTIONS = {"revision": None, "scheduler": "ddim", "dtype": "float32", "device": "cpu"}
CAPTIONS = ["a cat and a dog", "a dog", "hotdog", "the zebra"]
POSITIONS = [[(2,), (5,)], [(2,)], [(1, 2)], [(2, 3)]]
SEEDS = [5, 2**63 - 1, 0, 9]


@pytest.fixture(scope="module")
def sd1(tiny_pipelines):
    return str(tiny_pipelines["sd1"])


def differences(one, other):
    return [np.abs(a.image_hwc.astype(int) - b.image_hwc).max()
            for a, b in zip(one, other, strict=True)]  # fmt: skip


@pytest.mark.parametrize(
    "scheduler", [name for name in SCHEDULERS if name not in ("flow_euler", "scm")]
)
def test_an_image_depends_on_caption_and_seed_not_on_its_batch(sd1, scheduler):
    pipeline = load_pipeline(sd1, **{**OPTIONS, "scheduler": scheduler})
    generator = generator_of(pipeline, steps=3, guidance=4.0, size_hw=(64, 48))
    together = generator.generate(CAPTIONS, POSITIONS, SEEDS)
    alone = [
        generator.generate([caption], [positions], [seed])[0]
        for caption, positions, seed in zip(CAPTIONS, POSITIONS, SEEDS, strict=True)
    ]
    reversed_batch = generator.generate(CAPTIONS[::-1], POSITIONS[::-1], SEEDS[::-1])[::-1]
    # One step of 255: kernels may add in another order at another batch size.
    assert max(differences(together, alone)) <= 1
    assert max(differences(together, reversed_batch)) <= 1
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.heatmaps_nhw, b.heatmaps_nhw, atol=1e-5)
    another_seed = generator.generate(CAPTIONS[:1], POSITIONS[:1], [6])
    assert max(differences(together[:1], another_seed)) > 5


def test_the_same_batch_gives_the_same_bytes(sd1):
    generator = generator_of(load_pipeline(sd1, **OPTIONS), steps=2, guidance=4.0, size_hw=(64, 64))
    one, other = (generator.generate(CAPTIONS, POSITIONS, SEEDS) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.image_hwc, b.image_hwc)
        np.testing.assert_array_equal(a.heatmaps_nhw, b.heatmaps_nhw)


def test_guidance_of_one_is_no_guidance(sd1):
    pipeline = load_pipeline(sd1, **OPTIONS)
    rows = []
    handle = pipeline.unet.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    for guidance in (0.0, 1.0, 1.5):
        generator = generator_of(pipeline, steps=1, guidance=guidance, size_hw=(64, 64))
        generator.generate(["cat"], [[]], [0])
    handle.remove()
    assert rows == [1, 1, 2]


def conditional_rows(value, count):
    """The last rows of every tensor with rows, in what a UNet is called with."""
    if isinstance(value, dict):
        return {name: conditional_rows(item, count) for name, item in value.items()}
    has_rows = isinstance(value, torch.Tensor) and value.ndim > 1
    return value[-count:] if has_rows else value


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_guidance_ends_after_its_share_of_the_steps(tiny_pipelines, name):
    pipeline = load_pipeline(str(tiny_pipelines[name]), **OPTIONS)
    unet, calls = pipeline.unet, []
    handle = unet.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    generated = {}
    for share in (0.1, 0.5, 1.0):
        calls.clear()
        generator = generator_of(
            pipeline, steps=4, guidance=5.0, size_hw=(64, 64), guided_share=share
        )
        generated[share] = generator.generate(["cat", "a dog"], [[(1,)], [(2,)]], [0, 1])
        guided = {0.1: 1, 0.5: 2, 1.0: 4}[share]
        assert [len(args[0]) for args, _ in calls] == [4] * guided + [2] * (4 - guided)
        # Attribution saw the captions' own rows in every step, guided or not.
        weights = noun_weights([[(1,)], [(2,)]], pipeline.tokenizer.model_max_length)
        made = list(calls)
        with torch.no_grad(), recording(unet, weights, (16, 16)) as attribution:
            for args, kwargs in made:
                unet(*(conditional_rows(a, 2) for a in args), **conditional_rows(kwargs, 2))
        expected = attribution.heatmaps_bnhw().numpy()
        for one, heatmaps in zip(generated[share], expected, strict=True):
            np.testing.assert_allclose(one.heatmaps_nhw, heatmaps, atol=1e-5)
    handle.remove()
    assert max(differences(generated[0.1], generated[1.0])) > 0


def test_a_batch_filled_up_gives_the_same_drawings(sd1):
    pipeline = load_pipeline(sd1, **OPTIONS)
    rows = []
    handle = pipeline.unet.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    plain = generator_of(pipeline, steps=1, guidance=1.0, size_hw=(64, 64))
    full = generator_of(pipeline, steps=1, guidance=1.0, size_hw=(64, 64), fill_up_to=4)
    expected = plain.generate(CAPTIONS[:3], POSITIONS[:3], SEEDS[:3])
    found = full.generate(CAPTIONS[:3], POSITIONS[:3], SEEDS[:3])
    handle.remove()
    assert rows == [3, 4] and len(found) == 3
    assert max(differences(expected, found)) <= 1
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a.heatmaps_nhw, b.heatmaps_nhw, atol=1e-5)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_fused_projections_and_channels_last_only_round(tiny_pipelines, name):
    generated = []
    for fast in (False, True):
        pipeline = load_pipeline(str(tiny_pipelines[name]), **OPTIONS)
        optimize_pipeline(pipeline, compiled=False, channels_last=fast, fused_projections=fast)
        generator = generator_of(pipeline, steps=2, guidance=5.0, size_hw=(64, 40))
        generated.append(generator.generate(CAPTIONS, POSITIONS, SEEDS))
    used = {type(p).__name__ for p in pipeline.unet.attn_processors.values()}
    assert used == {"AttnProcessor2_0", "FusedAttnProcessor2_0"}
    assert max(differences(*generated)) <= 1
    for a, b in zip(*generated, strict=True):
        np.testing.assert_allclose(a.heatmaps_nhw, b.heatmaps_nhw, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_a_compiled_pipeline_only_rounds_and_compiles_once(tiny_pipelines):
    """UNet and decoder, with all the rest that makes generation faster."""
    generated = []
    torch._dynamo.reset()
    for fast in (False, True):
        pipeline = load_pipeline(str(tiny_pipelines["sd2"]), **OPTIONS)
        optimize_pipeline(pipeline, compiled=fast, channels_last=fast, fused_projections=fast)
        generator = generator_of(pipeline, steps=2, guidance=5.0, size_hw=(64, 40), fill_up_to=4)
        generated.append(generator.generate(CAPTIONS, POSITIONS, SEEDS))
        with torch._dynamo.config.patch(error_on_recompile=fast):
            generated[-1] += generator.generate(CAPTIONS[:3], POSITIONS[:3], SEEDS[:3])
    torch._dynamo.reset()
    assert max(differences(*generated)) <= 1
    for a, b in zip(*generated, strict=True):
        np.testing.assert_allclose(a.heatmaps_nhw, b.heatmaps_nhw, atol=1e-5)


def test_the_negative_prompt_counts_under_guidance_only(sd1):
    pipeline = load_pipeline(sd1, **OPTIONS)
    variants = {
        (guidance, negative): generator_of(
            pipeline, steps=2, guidance=guidance, size_hw=(64, 64), negative_prompt=negative
        ).generate(["cat"], [[]], [0])
        for guidance in (1.0, 6.0)
        for negative in ("", "dog")
    }
    assert max(differences(variants[1.0, ""], variants[1.0, "dog"])) == 0
    assert max(differences(variants[6.0, ""], variants[6.0, "dog"])) > 0


class MemoryLimit:
    """A pipeline that runs out of memory above a number of prompts."""

    def __init__(self, pipeline, most):
        self._pipeline, self._most, self.sizes = pipeline, most, []

    def __getattr__(self, name):
        return getattr(self._pipeline, name)

    def __call__(self, prompt, **options):
        self.sizes.append(len(prompt))
        if len(prompt) > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._pipeline(prompt=prompt, **options)


def test_out_of_memory_halves_the_batch_for_good(sd1):
    pipeline = load_pipeline(sd1, **OPTIONS)
    expected = generator_of(pipeline, steps=1, guidance=1.0, size_hw=(64, 64)).generate(
        CAPTIONS, POSITIONS, SEEDS
    )
    limited = MemoryLimit(pipeline, most=1)
    generator = generator_of(limited, steps=1, guidance=1.0, size_hw=(64, 64))
    generated = generator.generate(CAPTIONS, POSITIONS, SEEDS)
    assert limited.sizes == [4, 2, 1, 1, 1, 1]
    assert max(differences(generated, expected)) <= 1
    generator.generate(CAPTIONS[:2], POSITIONS[:2], SEEDS[:2])
    assert limited.sizes[6:] == [1, 1]
    limited = MemoryLimit(pipeline, most=2)
    full = generator_of(limited, steps=1, guidance=1.0, size_hw=(64, 64), fill_up_to=4)
    padded = full.generate(CAPTIONS[:3], POSITIONS[:3], SEEDS[:3])
    assert max(differences(padded, expected[:3])) <= 1
    assert limited.sizes == [4, 2, 2]
    nothing = MemoryLimit(pipeline, most=0)
    with pytest.raises(torch.OutOfMemoryError):
        generator_of(nothing, steps=1, guidance=1.0, size_hw=(64, 64)).generate(["cat"], [[]], [0])


def test_an_image_that_is_not_finite_is_none(sd1):
    pipeline = load_pipeline(sd1, **OPTIONS)

    class Broken(MemoryLimit):
        def __call__(self, **options):
            images = self._pipeline(**options).images
            images[1, 0, 0] = torch.nan
            return SimpleNamespace(images=images)

    generator = generator_of(Broken(pipeline, 9), steps=1, guidance=1.0, size_hw=(64, 64))
    generated = generator.generate(CAPTIONS[:2], POSITIONS[:2], SEEDS[:2])
    assert [one.image_hwc is None for one in generated] == [False, True]


def test_positions_are_found_while_another_thread_generates(sd1):
    """A fast tokenizer keeps the padding and truncation of its last call inside itself."""
    pipeline = load_pipeline(sd1, **OPTIONS)
    generator = generator_of(pipeline, steps=1, guidance=1.0, size_hw=(64, 64))
    long = "dog " * 80 + "cat"
    found, expected = [], [[(2,)], [()]]
    done = threading.Event()

    def find_positions():
        while not done.is_set():
            found.append(generator.positions("a cat", [[(2, 5)]]))
            found.append(generator.positions(long, [[(len(long) - 3, len(long))]]))

    thread = threading.Thread(target=find_positions)
    thread.start()
    try:
        lengths = set()
        for _ in range(1500):
            encoded = pipeline.tokenizer(
                ["a cat"], padding="max_length", truncation=True, max_length=77
            )
            lengths.add(len(encoded["input_ids"][0]))
            pipeline.tokenizer(["a cat"], padding="longest")
    finally:
        done.set()
        thread.join()
    assert lengths == {77}
    assert len(found) > 100
    assert found == expected * (len(found) // 2)


def test_two_threads_may_generate_with_one_pipeline(sd1):
    """The scheduler and the UNet's processors hold the state of one batch."""
    generator = generator_of(load_pipeline(sd1, **OPTIONS), steps=3, guidance=4.0, size_hw=(64, 64))

    def one_image(number):
        return generator.generate([CAPTIONS[number]], [POSITIONS[number]], [SEEDS[number]])[0]

    alone = [one_image(number) for number in range(4)]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(one_image, range(4)))
    assert differences(alone, together) == [0] * 4
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.heatmaps_nhw, other.heatmaps_nhw)
