"""Run: pytest tests/benchmarks/test_bench.py"""

import functools
import json

import pytest
import torch
from torch._dynamo.utils import counters

from bench import measure, presets
from bench.limits import BenchSpec, ceiling, operations
from bench.measure import bench
from bench.report import run, table
from ovref.config import load
from ovref.errors import ConfigError


def parameters(build):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


@functools.cache
def on_meta(preset):
    return presets.pipeline(preset, "ddim", torch.float32, torch.device("meta"))


@pytest.mark.parametrize(
    ("preset", "unet", "texts"),
    [
        ("sd15", 859_520_964, [123_060_480]),
        ("sd21", 865_910_724, [340_387_840]),
        ("sdxl", 2_567_463_684, [123_060_480, 694_659_840]),
    ],
)
def test_presets_have_as_many_parameters_as_the_published_models(preset, unet, texts):
    pipeline = on_meta(preset)
    found = [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    assert parameters(lambda: pipeline.unet) == unet
    assert [parameters(lambda p=part: p) for part in found if part is not None] == texts
    assert parameters(lambda: pipeline.vae) == 83_653_863


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dinov2_large", 304_368_640),
        ("clip_large", 303_179_776),
        ("sam_base", 89_670_912),
    ],
)
def test_backbones_have_as_many_parameters_as_the_published_models(name, expected):
    assert parameters(presets.backbones()[name][0]) == expected


def test_the_tokenizer_is_clips():
    tokenizer = presets.clip_tokenizer()
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    expected = [49406, 320, 1125, 539, 320, 2368, 49407]  # of the published clip-vit-large-patch14
    assert tokenizer("a photo of a cat").input_ids == expected
    assert tokenizer.is_fast


def test_operations_of_stable_diffusion():
    spec = BenchSpec(preset="sd15", steps=50, guidance=7.5, guided_share=0.5)
    found = operations(spec, on_meta("sd15"))
    # Published: about 400 G multiply-additions a row, attention included, and 6.7 G a text.
    assert 0.78e12 < found["unet_row"] < 0.82e12
    assert 12e9 < found["text"] < 14e9
    assert found["unet_rows_per_image"] == 50 + 25
    assert found["image"] == 75 * found["unet_row"] + 2 * found["text"] + found["decode"]


def test_guidance_of_sdxl_encodes_no_empty_text():
    spec = BenchSpec(preset="sdxl", steps=4, guidance=5.0)
    found = operations(spec, on_meta("sdxl"))
    assert (found["texts_per_image"], found["unet_rows_per_image"]) == (1, 8)
    # Published: about 3,000 G multiply-additions without attention, which adds an eighth.
    assert 5.8e12 < found["unet_row"] < 7.2e12


def test_the_ceiling_is_a_rate_of_this_machine():
    found = ceiling(torch.float32, torch.device("cpu"))
    assert 1e9 < found["flops"] < 1e14


def test_a_whole_benchmark_of_the_miniature(tmp_path, capsys):
    path = tmp_path / "results" / "bench.json"
    settings = ["steps=2", "repeats=1", "batches=1", "batch_sizes=[2]", "guidance=4.0"]
    run(load(BenchSpec, None, [*settings, "schedulers=[dpm_solver++]", f"output={path}"]))
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    assert row["scheduler"] == "dpm_solver++" and row["batch_size"] == 2
    assert row["dropped"] == 0 and row["references"] >= 2
    parts = row["seconds_by_part"]
    assert list(parts) == [
        "unet", "attribution", "scheduler", "text", "decode", "masks", "jpeg", "embedding",
        "writing",
    ]  # fmt: skip
    assert all(parts[name] > 0 for name in parts if name != "attribution")
    flops = result["flops"]
    assert flops["unet_rows_per_image"] == 4
    assert row["share_of_ceiling"] == pytest.approx(
        flops["image"] * row["images_per_second"] / result["ceiling"]["flops"]
    )
    printed = capsys.readouterr().out
    assert printed.strip() == table(result).strip()
    assert "| dpm_solver++ | 2 |" in printed and "4 UNet rows" in printed


@pytest.mark.slow
def test_nothing_is_compiled_while_the_whole_worker_is_timed(monkeypatch):
    """The parts and a first batch have met all versions of UNet and decoder."""
    whole, compiled = measure._whole, torch.nn.Module.compile
    graphs = []

    def counted(*arguments):
        before = counters["stats"]["unique_graphs"]
        found = whole(*arguments)
        graphs.append(counters["stats"]["unique_graphs"] - before)
        return found

    def without_kernels(module, **options):
        compiled(module, **{**options, "backend": "eager", "options": None})

    monkeypatch.setattr(measure, "_whole", counted)
    monkeypatch.setattr(torch.nn.Module, "compile", without_kernels)
    spec = BenchSpec(
        device="cpu", compiled=True, steps=2, guided_share=0.5, schedulers=("euler",),
        batch_sizes=(1, 2, 3), batches=1, repeats=1,
    )  # fmt: skip
    result = bench(spec, progress=lambda line: None)
    assert len(result["rows"]) == 3 and graphs[1::2] == [0] * 3
    torch.compiler.reset()


def test_a_batch_that_does_not_fit_is_a_row_of_its_own(monkeypatch):
    def no_room(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("bench.measure._row", no_room)
    result = bench(BenchSpec(batch_sizes=(1, 2)), progress=lambda line: None)
    assert [row["error"] for row in result["rows"]] == ["out of memory"] * 2
    assert "ddim, batch of 2: out of memory." in table(result)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2_large", "clip_large", "grounding_dino_base", "sam_base"])
def test_backbones_run(name):
    build, inputs = presets.backbones()[name]
    torch.manual_seed(0)
    with torch.no_grad():
        build().eval()(**inputs(1))


@pytest.mark.parametrize(
    "setting",
    [
        "preset=sd3",
        "steps=0",
        "batch_sizes=[0]",
        "stepz=3",
        "schedulers=[heun]",
        "guided_share=0.0",
        "cuda_graphs=true",
    ],
)
def test_bad_settings_are_refused(setting):
    with pytest.raises(ConfigError, match=setting.partition("=")[0]):
        load(BenchSpec, None, [setting])
