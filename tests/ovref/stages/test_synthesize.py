"""Run: pytest tests/ovref/stages/test_synthesize.py"""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from ovref.config import dump, parse
from ovref.contract import Dropped, base_key
from ovref.errors import ConfigError, ModelError
from ovref.identity import fingerprint, record_key, record_seed, spec_identity
from ovref.models.diffusion import GeneratedImage
from ovref.records import YES, ImageRecord, Noun, Prompt
from ovref.stages.synthesize import USUAL_BATCH_SIZE, Lora, Synthesize, SynthesizeStage


def prompt(caption, *nouns, key=None):
    """`nouns` are texts, each found at its next occurrence in the caption."""
    found, after = [], {}
    for noun in nouns:
        start = caption.index(noun, after.get(noun, 0))
        after[noun] = start + len(noun)
        found.append(Noun(text=noun, start=start, end=start + len(noun)))
    key = key or record_key("test", caption)
    return Prompt(key=key, caption=caption, nouns=tuple(found), source="test:1")


def spec(**fields):
    return Synthesize(**{"model": "fake", "size_hw": (16, 24), "batch_size": 2, **fields})


class FakeGenerator:
    """Draws flat images; the heatmaps say in their values which word and seed they were made for.

    A noun beyond character 40 has no position. The caption's last word names a fault.
    """

    def __init__(self):
        self.batches = []

    def positions(self, caption, spans):
        return [tuple(start for start, end in noun if end <= 40) for noun in spans]

    def generate(self, captions, positions, seeds):
        self.batches.append(list(captions))
        return [self._one(*order) for order in zip(captions, positions, seeds, strict=True)]

    def _one(self, caption, positions, seed):
        image = np.full((16, 24, 3), seed % 256, np.uint8)
        maps = np.zeros((len(positions), 4, 6), np.float32)
        for n, starts in enumerate(positions):
            maps[n, 1:3, 1:4] = 0.01 * (1 + len(starts))
            maps[n, 0, 0] = 0.001 * (1 + sum(starts))
        fault = caption.split()[-1]
        if fault == "nan":
            maps[0, 0, 0] = np.nan
        if fault == "flat":
            maps[0] = 0.5
        return GeneratedImage(image_hwc=None if fault == "black" else image, heatmaps_nhw=maps)


def run(prompts, **fields):
    generator = FakeGenerator()
    return list(SynthesizeStage(spec(**fields), generator)(iter(prompts))), generator


def test_an_image_record_holds_everything():
    order = prompt("a cat and a dog", "cat", "dog")
    (record,), _ = run([order], run_seed=3)
    assert isinstance(record, ImageRecord)
    assert (record.key, record.caption, record.source) == (order.key, order.caption, "test:1")
    assert record.seed == record_seed(3, order.key)
    assert [region.noun for region in record.regions] == list(order.nouns)
    assert all(region.source == "daam" and region.score > 1 for region in record.regions)
    assert record.image_hwc().shape == (16, 24, 3)
    assert record.image[:3] == b"\xff\xd8\xff"
    assert abs(int(record.image_hwc()[0, 0, 0]) - record.seed % 256) <= 2
    assert record.heatmaps_nhw.shape == (2, 4, 6) and record.heatmaps_nhw.dtype == np.float16
    assert record.heatmaps_nhw.min() == 0 and (record.heatmaps_nhw.max(axis=(1, 2)) == 1).all()
    for region in record.regions:
        assert region.mask_hw.shape == (16, 24)
        assert region.mask_hw[8, 8] == YES and region.mask_hw[15, 23] != YES
    assert record.provenance["generator"] == "fake" and record.provenance["steps"] == 25


def test_every_prompt_is_answered_and_batches_keep_their_order():
    prompts = [prompt(f"a dog number {i}", "dog") for i in range(5)]
    prompts.insert(2, prompt("nothing here"))
    out, generator = run(prompts)
    assert {base_key(r.key) for r in out} == {p.key for p in prompts}
    generated = [p for p in prompts if p.nouns]
    assert [r.key for r in out if isinstance(r, ImageRecord)] == [p.key for p in generated]
    assert [len(batch) for batch in generator.batches] == [2, 2, 1]


def test_one_batch_is_generated_ahead_while_records_are_taken():
    generator = FakeGenerator()
    stage = SynthesizeStage(spec(), generator)
    taken = []

    def feed():
        for i in range(8):
            taken.append(i)
            yield prompt(f"a dog number {i}", "dog")

    out = stage(feed())
    assert next(out).caption == "a dog number 0"
    assert len(taken) == 4  # the next batch has been handed to the thread that generates
    assert next(out).caption == "a dog number 1"
    assert len(taken) == 4
    assert next(out).caption == "a dog number 2"
    assert len(taken) == 6
    out.close()
    assert len(generator.batches) <= 3


def test_an_error_while_drawing_reaches_whoever_takes_the_records():
    class Broken(FakeGenerator):
        def generate(self, captions, positions, seeds):
            if len(self.batches) == 1:
                raise ModelError("no more")
            return super().generate(captions, positions, seeds)

    found = []
    with pytest.raises(ModelError, match="no more"):
        for record in SynthesizeStage(spec(), Broken())(
            iter([prompt(f"a dog number {i}", "dog") for i in range(6)])
        ):
            found.append(record.caption)
    assert found == ["a dog number 0", "a dog number 1"]


def test_no_prompts_draw_nothing():
    out, generator = run([])
    assert out == [] and generator.batches == []


@pytest.mark.parametrize("nouns", [("dog", "cat"), ("dog", "cat", "dog")], ids=str)
def test_a_noun_said_twice_is_one_region_of_all_its_mentions(nouns):
    (record,), _ = run([prompt("dog cat dog", *nouns)])
    assert [(r.noun.text, r.noun.start) for r in record.regions] == [("dog", 0), ("cat", 4)]
    # The fake writes 0.001 * (1 + sum of positions) over 0.01 * (1 + number of positions).
    expected = [0.001 * (1 + 0 + 8) / 0.03, 0.001 * (1 + 4) / 0.02]
    np.testing.assert_allclose(record.heatmaps_nhw[:, 0, 0], expected, atol=2e-3)


def test_a_noun_beyond_the_context_is_dropped_and_the_rest_kept():
    order = prompt("a cat " + "x " * 20 + "dog", "cat", "dog")
    out, _ = run([order])
    assert out[0] == Dropped(f"{order.key}#1", "noun_beyond_context")
    assert [region.noun.text for region in out[1].regions] == ["cat"]
    assert len(out[1].heatmaps_nhw) == 1


def test_a_prompt_with_no_noun_in_the_context_is_not_drawn():
    order = prompt("x " * 20 + "dog", "dog")
    out, generator = run([order])
    assert out == [
        Dropped(f"{order.key}#0", "noun_beyond_context"),
        Dropped(order.key, "no_regions"),
    ]
    assert generator.batches == []


@pytest.mark.parametrize(
    ("fault", "reason"), [("nan", "nonfinite_heatmap"), ("flat", "empty_mask")]
)
def test_a_bad_heatmap_costs_its_region(fault, reason):
    order = prompt(f"a cat, a dog {fault}", "cat", "dog")
    out, _ = run([order])
    assert out[0] == Dropped(f"{order.key}#0", reason)
    assert [region.noun.text for region in out[1].regions] == ["dog"]
    alone = prompt(f"a cat {fault}", "cat")
    assert run([alone])[0] == [
        Dropped(f"{alone.key}#0", reason),
        Dropped(alone.key, "no_regions"),
    ]


def test_mask_area_limits():
    order = prompt("a cat", "cat")
    assert run([order], min_area=0.9, max_area=0.95)[0][0].reason == "empty_mask"
    assert run([order], min_area=0.0, max_area=0.01)[0][0].reason == "full_mask"


def test_an_image_that_is_not_finite_is_dropped():
    bad, good = prompt("a dog black", "dog"), prompt("a dog", "dog")
    out, _ = run([bad, good])
    assert out[0] == Dropped(bad.key, "nonfinite_image") and out[1].key == good.key


def test_seeds_come_from_run_seed_and_key():
    prompts = [prompt("a dog", "dog", key=key) for key in ("a", "b")]
    seeds = {
        (run_seed, r.key): r.seed for run_seed in (0, 1) for r in run(prompts, run_seed=run_seed)[0]
    }
    assert len(set(seeds.values())) == 4
    assert seeds[0, "b"] == run([prompts[1]])[0][0].seed


def test_the_spec_is_strict_picklable_and_has_an_identity():
    one = spec()
    assert pickle.loads(pickle.dumps(one)) == one
    assert parse(Synthesize, dump(one)) == one
    assert fingerprint(spec_identity(one)) != fingerprint(spec_identity(spec(steps=26)))
    assert spec_identity(one)["name"] == "synthesize"
    with pytest.raises(ConfigError, match="unknown key stepz"):
        parse(Synthesize, {"model": "x", "stepz": 3})
    with pytest.raises(ConfigError, match="scheduler"):
        parse(Synthesize, {"model": "x", "scheduler": "heun"})
    with pytest.raises(ConfigError, match=r"binarise\.threshold|threshold must be"):
        parse(Synthesize, {"model": "x", "binarise": {"threshold": 2.0}})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"guidance": -1.0}, "guidance"),
        ({"size_hw": (64, 60)}, "size_hw"),
        ({"size_hw": (0, 64)}, "size_hw"),
        ({"batch_size": 0}, "batch_size"),
        ({"guided_share": 0.0}, "guided_share"),
        ({"guided_share": 1.5}, "guided_share"),
        ({"min_area": 0.5, "max_area": 0.5}, "min_area and max_area"),
        ({"max_area": 1.1}, "min_area and max_area"),
        ({"jpeg_quality": 0}, "jpeg_quality"),
        ({"blocks": (-1,)}, "blocks"),
        ({"read_steps": (0.5, 0.5)}, "read_steps must be ordered"),
        ({"aspect_ratio_hw": (0, 1)}, "aspect_ratio_hw"),
        ({"text_encoder_bits": 4, "base": "sd"}, "text_encoder_bits needs a model in diffusers'"),
        ({"text_encoder_bits": 8, "offload": True}, "8 does not go with offload.*bits to 4, whose"),
    ],
    ids=str,
)
def test_values_out_of_range_name_the_field(fields, named):
    with pytest.raises(ValueError, match=named):
        spec(**fields)


@pytest.mark.parametrize(
    ("size_hw", "ratio_hw", "expected"),
    [
        ((1024, 1024), None, (1024, 1024)),
        ((1024, 1024), (1, 1), (1024, 1024)),
        ((1024, 1024), (2, 3), (832, 1248)),
        ((1024, 1024), (9, 16), (768, 1376)),
        ((1000, 1048), (16, 9), (1376, 768)),
        ((64, 64), (1, 20), (32, 288)),
    ],
)
def test_the_size_of_an_aspect_ratio(size_hw, ratio_hw, expected):
    assert spec(size_hw=size_hw, aspect_ratio_hw=ratio_hw).image_size_hw == expected


def test_settings_that_came_later_change_no_fingerprint_at_their_defaults():
    later = {"reading", "blocks", "read_steps", "variant", "base", "loras", "offload"}
    later |= {"aspect_ratio_hw", "text_encoder_bits"}
    assert not later & set(spec_identity(spec())["fields"])
    lora = parse(Synthesize, {"model": "x", "loras": [{"model": "y.safetensors"}]})
    assert lora.loras == (Lora(model="y.safetensors"),)
    assert spec_identity(lora)["fields"]["loras"][0]["scale"] == 1.0


def test_the_batch_size_auto_is_the_usual_one_without_a_gpu(tiny_pipelines):
    model = str(tiny_pipelines["sd1"])
    fields = {"model": model, "steps": 1, "size_hw": (64, 64), "min_area": 0.0, "max_area": 1.0}
    asked = parse(Synthesize, {**dump(spec(**fields)), "batch_size": "auto"})
    stage = asked.build()
    assert (asked.batch_size, stage.batch_size) == ("auto", USUAL_BATCH_SIZE)
    assert fingerprint(spec_identity(asked)) != fingerprint(spec_identity(spec(**fields)))
    (record,) = stage(iter([prompt("a cat", "cat")]))
    assert record.provenance["batch_size"] == USUAL_BATCH_SIZE
    (usual,) = spec(**{**fields, "batch_size": USUAL_BATCH_SIZE}).build()(
        iter([prompt("a cat", "cat")])
    )
    assert record.image == usual.image and "batch_size" not in usual.provenance


@pytest.mark.parametrize("value", ["many", 2.5, True, None], ids=str)
def test_a_batch_size_is_a_number_or_auto(value):
    with pytest.raises(ConfigError, match="batch_size"):
        parse(Synthesize, {"model": "x", "batch_size": value})


def test_the_module_imports_without_torch():
    code = (
        "import sys; import ovref.stages.synthesize as s; s.Synthesize(model='x');"
        "sys.exit(bool({'torch', 'diffusers', 'transformers', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_that_does_not_load_fails_at_build(tmp_path):
    with pytest.raises(ModelError, match="cannot load the generator"):
        spec(model=str(tmp_path)).build()


@pytest.mark.parametrize("scheduler", ["ddim", "sde_dpm_solver++"])
def test_a_real_pipeline_twice_gives_the_same_records(tiny_pipelines, scheduler):
    real = spec(
        model=str(tiny_pipelines["sd1"]), scheduler=scheduler, steps=2, size_hw=(64, 40),
        batch_size=2, max_area=1.0, min_area=0.0,
    )  # fmt: skip
    long = prompt("a cat " + "x" * 80 + " dog", "cat", "dog")
    prompts = [prompt("a cat and a dog", "cat", "dog"), long, prompt("hotdog", "hotdog")]
    one, two = (list(real.build()(iter(prompts))) for _ in range(2))
    assert [r.key for r in one] == [long.key + "#1", *(p.key for p in prompts)]
    assert one[0].reason == "noun_beyond_context"
    for a, b in zip(one[1:], two[1:], strict=True):
        assert a.image == b.image and a.seed == b.seed and a.provenance == b.provenance
        np.testing.assert_array_equal(a.heatmaps_nhw, b.heatmaps_nhw)
        assert a.image_hwc().shape == (64, 40, 3)
        assert a.heatmaps_nhw.shape == (len(a.regions), 16, 10)
        for x, y in zip(a.regions, b.regions, strict=True):
            np.testing.assert_array_equal(x.mask_hw, y.mask_hw)
            assert x.score == y.score
    # Made in another shard, the image is the same drawing but for rounding.
    (alone,) = real.build()(iter(prompts[2:]))
    assert np.abs(alone.image_hwc().astype(int) - one[-1].image_hwc()).mean() < 1
