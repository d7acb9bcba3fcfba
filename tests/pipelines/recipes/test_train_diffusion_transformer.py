"""Run: pytest tests/pipelines/recipes/test_train_diffusion_transformer.py"""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ovref.models.loading import load_pipeline  # noqa: E402
from ovref_miniature import weights_path  # noqa: E402
from recipes.miniature import architectures_transformer, data  # noqa: E402
from recipes.miniature import train_diffusion_transformer as recipe  # noqa: E402
from slow_attribution import assert_equals_slow  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.POOLS, "few", (4, 0, {"pair_share": 0.0, "empty_share": 0.0}))
        patch.setitem(data.POOLS, "others", (3, 1_000_000, {}))
        work = tmp_path_factory.mktemp("work")
        pools = [data.load_pool(work, name) for name in ("few", "others")]
    return recipe.prepare(pools, "cpu"), pools


@pytest.fixture
def shallow(monkeypatch):
    """The transformer with two narrow blocks, so that steps are fast."""
    small = {"BLOCKS": 2, "HEADS": 2, "WIDTH": 64}
    for name, value in small.items():
        monkeypatch.setattr(architectures_transformer, name, value)
    monkeypatch.setattr(recipe, "WIDTH", 64)
    monkeypatch.setattr(recipe, "ALIGNED", 0)


def test_several_processes_draw_the_same_pool(tmp_path, monkeypatch):
    monkeypatch.setitem(data.POOLS, "few", (5, 7, {"pair_share": 1.0}))
    monkeypatch.setattr(data, "PART", 2)
    one = data.load_pool(tmp_path / "one", "few")
    two = data.load_pool(tmp_path / "two", "few", processes=2)
    np.testing.assert_array_equal(one.images_nhwc, two.images_nhwc)
    np.testing.assert_array_equal(one.named_nc, two.named_nc)
    assert one.captions == two.captions and len(one.captions) == 5


def test_text_is_that_of_the_shipped_encoders(prepared):
    """Against open_clip for the second encoder, transformers' CLIPTextModel for the first."""
    import open_clip
    from transformers import CLIPTextModel, CLIPTokenizer

    ready, pools = prepared
    captions = [caption for pool in pools for caption in pool.captions]
    folder = weights_path("stable_diffusion")
    name = f"local-dir:{weights_path('clip')}"
    clip, _ = open_clip.create_model_from_pretrained(name)
    first = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    ids = CLIPTokenizer.from_pretrained(folder / "tokenizer")(
        captions, padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        projected = clip.eval().encode_text(open_clip.get_tokenizer(name)(captions))
        out = first(ids, output_hidden_states=True)
    torch.testing.assert_close(ready.pooled_nc[:, 96:], projected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ready.pooled_nc[:, :96], out.pooler_output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        ready.text_ntc[:, :, :96], out.hidden_states[-2], atol=1e-5, rtol=1e-5
    )
    assert ready.alone == 4 and 0.8 < float(ready.latents_nchw.std()) < 1.2


def test_one_repeated_zero_is_as_many_zeros(prepared, shallow):
    ready, _ = prepared
    torch.manual_seed(0)
    model = recipe.Denoiser()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    plain = recipe.new_transformer()
    plain.load_state_dict(model.transformer.state_dict())
    noisy, timesteps = torch.randn(2, 4, 16, 16), torch.tensor([100.0, 700.0])
    text = torch.cat([ready.text_ntc[:2], torch.zeros(2, recipe.ZEROS, 192)], 1)
    with torch.no_grad():
        velocity, guess = model(noisy, timesteps, ready.text_ntc[:2], ready.pooled_nc[:2])
        expected = plain(noisy, text, ready.pooled_nc[:2], timesteps).sample
    torch.testing.assert_close(velocity, expected, atol=1e-4, rtol=1e-4)
    assert guess.shape == (2, 256, 96) and float(expected.std()) > 0.1


def test_training_lowers_the_error_and_its_result_generates(
    prepared, shallow, tmp_path, monkeypatch
):
    """Two blocks on seven scenes, continued once; then through `load_pipeline`."""
    for name, value in (("WARM_UP", 5), ("LOG_EVERY", 4), ("SAVE_SECONDS", 0), ("AVERAGE", 0.8)):
        monkeypatch.setattr(recipe, name, value)
    ready, _ = prepared
    output = tmp_path / "out"
    output.mkdir()
    clock = iter(range(1_000_000))
    # One second a call, so that the number of steps is fixed.
    monkeypatch.setattr(recipe.time, "perf_counter", lambda: float(next(clock)))
    options = {"batch": 7, "rate": 2e-3, "compiled": False, "facts": {"a": 1}}
    torch.manual_seed(1)
    model = recipe.Denoiser()
    model.standardise_text(ready.text_ntc[:, :16])
    embedded = model.transformer.context_embedder(ready.text_ntc[:, :16])
    assert embedded.mean((0, 1)).abs().max() < 1e-3
    rows = recipe.train(model, ready, tmp_path, output, seconds=24, **options)
    again = recipe.Denoiser()
    more = recipe.train(again, ready, tmp_path, output, seconds=60, **options)
    assert more[0]["step"] > rows[-1]["step"] and more[-1]["seconds"] > 40
    assert more[-1]["error"] < 0.9 * rows[0]["error"]
    assert more[-1]["cosine"] > rows[0]["cosine"] + 0.2
    log = json.loads((output / "training.json").read_text())
    assert log["a"] == 1 and log["log"] == more and log["steps"] >= more[-1]["step"]

    transformer = recipe.SD3Transformer2DModel.from_pretrained(
        output / "transformer", torch_dtype=torch.float32
    )
    folder = tmp_path / "pipeline"
    architectures_transformer.save_stable_diffusion_3(folder, transformer)
    pipeline = load_pipeline(
        str(folder), revision=None, scheduler="flow_euler", dtype="float32", device="cpu"
    )
    for reading in ("share", "output"):
        _, heatmaps = assert_equals_slow(
            pipeline, lambda positions, keys: (0, positions), read_blocks=(0, 1), calls=(0, 1),
            guidance=3.0, blocks=(0, 1), read_steps=(0.0, 1.0), reading=reading,
            size_hw=(32, 48),
        )  # fmt: skip
        assert all(np.isfinite(maps).all() for maps in heatmaps)


def test_training_begins_with_given_weights(prepared, shallow, tmp_path, monkeypatch):
    """`--start`: at a rate of zero the result is the start; at another one it is near."""
    ready, pools = prepared
    monkeypatch.setattr(recipe, "prepare", lambda *_: ready)
    monkeypatch.setattr(recipe, "load_pool", lambda work, name, **_: pools[name == "others"])
    monkeypatch.setattr(recipe, "LOG_EVERY", 2)
    torch.manual_seed(3)
    begun = recipe.new_transformer()
    for parameter in begun.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    begun.half().save_pretrained(tmp_path / "start")
    expected = begun.float().state_dict()

    def trained(name, rate):
        clock = iter(range(1_000_000))
        monkeypatch.setattr(recipe.time, "perf_counter", lambda: float(next(clock)))
        output = tmp_path / name
        arguments = {"work": output, "output": output, "start": tmp_path / "start", "rate": rate,
                     "seconds": 12, "batch": 3}  # fmt: skip
        words = [str(word) for key, value in arguments.items() for word in (f"--{key}", value)]
        monkeypatch.setattr("sys.argv", ["train", *words, "--pools", "few", "others"])
        recipe.main()
        log = json.loads((output / "training.json").read_text())
        assert log["continued"] and log["steps"] > 2 and log["log"][0]["error"] > 0
        found = recipe.SD3Transformer2DModel.from_pretrained(
            output / "transformer", torch_dtype=torch.float32
        )
        return found.state_dict()

    still, moved = trained("still", 0.0), trained("moved", 1e-3)
    assert all(torch.equal(still[name], value) for name, value in expected.items())
    gaps = [float((moved[name] - value).abs().max()) for name, value in expected.items()]
    assert 1e-5 < max(gaps) < 0.05
