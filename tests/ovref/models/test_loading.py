"""Run: pytest tests/ovref/models/test_loading.py"""

import json
import shutil
from typing import get_args, get_type_hints

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tiny_transformers
from original_layout import original_weights
from ovref.errors import ModelError
from ovref.models import loading
from ovref.models.diffusion import Generator
from ovref.models.loading import DTYPES, PIPELINES, load_pipeline
from ovref.models.schedulers import SCHEDULERS
from ovref.records import ImageRecord, Noun, Prompt
from ovref.stages.synthesize import Lora, Synthesize
from slow_attribution import (
    CAPTIONS,
    SPANS,
    assert_equals_slow,
    assert_tokens_are_nouns,
    settings_of,
)

OPTIONS = {"revision": None, "scheduler": "ddim", "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def sd1(tiny_pipelines):
    return str(tiny_pipelines["sd1"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(sd1, dtype):
    pipeline = load_pipeline(sd1, **{**OPTIONS, "dtype": dtype})
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {DTYPES[dtype]}


def test_a_loaded_pipeline_keeps_the_models_signal_table(tiny_pipelines):
    import diffusers

    pipeline = load_pipeline(str(tiny_pipelines["sd2"]), **{**OPTIONS, "scheduler": "dpm_solver++"})
    assert type(pipeline.scheduler) is diffusers.DPMSolverMultistepScheduler
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.safety_checker is None


def test_the_specs_schedulers_and_dtypes_are_the_ones_that_load():
    hints = get_type_hints(Synthesize)
    assert set(get_args(hints["scheduler"])) == set(SCHEDULERS)
    assert set(get_args(hints["dtype"])) == set(DTYPES)


def test_a_missing_model_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match=r"(?s)cannot load the .*nothing_here.*folder with"):
        load_pipeline(str(tmp_path / "nothing_here"), **OPTIONS)
    with pytest.raises(ModelError, match="no miniature model 'nope'"):
        load_pipeline("miniature:nope", **OPTIONS)


def test_a_foreign_pipeline_is_a_model_error(sd1, tmp_path):
    folder = tmp_path / "cogview"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "CogView4Pipeline"}))
    with pytest.raises(ModelError, match="is a CogView4Pipeline; attribution works with"):
        load_pipeline(str(folder), **OPTIONS)
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load the generator"):
        load_pipeline(str(folder), **OPTIONS)


def test_cut_off_weights_are_a_model_error(sd1, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(sd1, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load the generator"):
        load_pipeline(str(folder), **OPTIONS)


def test_pickled_weights_are_not_read(sd1, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(sd1, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load the generator"):
        load_pipeline(str(folder), **OPTIONS)


def test_a_model_that_needs_an_image_besides_the_text_is_refused(sd1, tmp_path):
    folder = tmp_path / "inpainting"
    shutil.copytree(sd1, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    unet = type(load_pipeline(sd1, **OPTIONS).unet).from_config(config | {"in_channels": 9})
    unet.save_pretrained(folder / "unet")
    with pytest.raises(ModelError, match=r"inpainting' has a UNet of 9 input .* the 4 of its lat"):
        load_pipeline(str(folder), **OPTIONS)


def test_an_sdxl_refiner_is_refused(tiny_pipelines, tmp_path):
    folder = tmp_path / "refiner"
    shutil.copytree(tiny_pipelines["sdxl"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    empty = {"text_encoder": [None, None], "tokenizer": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index | empty))
    with pytest.raises(ModelError, match="has no first text encoder"):
        load_pipeline(str(folder), **OPTIONS)


def weights_of(network):
    return torch.cat([parameter.flatten() for parameter in network.parameters()])


@pytest.mark.parametrize(
    ("pipeline", "class_name"),
    [
        ("sd1", "LatentConsistencyModelPipeline"),
        ("sd1", "StableDiffusionImg2ImgPipeline"),
        ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
    ],
)
def test_other_pipelines_of_the_same_networks_are_loaded(
    tiny_pipelines, tmp_path, pipeline, class_name
):
    folder = tmp_path / "other"
    shutil.copytree(tiny_pipelines[pipeline], folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": class_name}))
    found = load_pipeline(str(folder), **OPTIONS)
    expected = load_pipeline(str(tiny_pipelines[pipeline]), **OPTIONS)
    assert type(found) is type(expected)
    assert torch.equal(weights_of(found.unet), weights_of(expected.unet))


def test_a_variant_is_read_when_asked_for_and_suggested_when_not(sd1, tmp_path):
    pipeline = load_pipeline(sd1, **OPTIONS)
    diffusers.StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None).save_pretrained(
        tmp_path / "fp16", variant="fp16"
    )
    assert not list((tmp_path / "fp16" / "unet").glob("diffusion_pytorch_model.safetensors"))
    found = load_pipeline(str(tmp_path / "fp16"), variant="fp16", **OPTIONS)
    assert torch.equal(weights_of(found.unet), weights_of(pipeline.unet))
    with pytest.raises(ModelError, match="has weights of variant fp16: set variant"):
        load_pipeline(str(tmp_path / "fp16"), **OPTIONS)


def test_sharded_weights_are_read(sd1, tmp_path):
    pipeline = load_pipeline(sd1, **OPTIONS)
    diffusers.StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None).save_pretrained(
        tmp_path / "shards", max_shard_size="100KB"
    )
    assert len(list((tmp_path / "shards" / "unet").glob("*-of-*.safetensors"))) > 1
    found = load_pipeline(str(tmp_path / "shards"), **OPTIONS)
    assert torch.equal(weights_of(found.unet), weights_of(pipeline.unet))


@pytest.mark.parametrize(
    ("name", "base", "named"),
    [
        ("model.ckpt", None, "is a pickled checkpoint, which is never read"),
        ("model.safetensors", None, "is a single file, which has no configurations"),
        ("model.safetensors", "sd1", "cannot load the generator"),
        ("folder", "sd1", "is no single .safetensors file: base must be left out"),
    ],
)
def test_single_files_that_cannot_be_read(sd1, tmp_path, name, base, named):
    (tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(ModelError, match=named):
        load_pipeline(str(tmp_path / name), base=base and sd1, **OPTIONS)


def test_a_single_file_of_the_original_layout_is_read_without_a_network(sd1, tmp_path):
    """Network, decoder and text encoder come from the file, the rest from the base's folder."""
    pipeline = load_pipeline(sd1, **OPTIONS)
    torch.manual_seed(0)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        for parameter in part.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    save_file(original_weights(pipeline), tmp_path / "fine_tune.safetensors")
    found = load_pipeline(str(tmp_path / "fine_tune.safetensors"), base=sd1, **OPTIONS)
    for part in ("unet", "vae", "text_encoder"):
        torch.testing.assert_close(
            weights_of(getattr(found, part)), weights_of(getattr(pipeline, part)), rtol=0, atol=0
        )
    assert found.tokenizer("a cat")["input_ids"] == pipeline.tokenizer("a cat")["input_ids"]
    assert found.safety_checker is None


def test_a_single_file_of_stable_diffusion_xl(tiny_pipelines, tmp_path):
    """Both text encoders are in the file: CLIP as transformers names it, and OpenCLIP's own."""
    base = str(tiny_pipelines["sdxl"])
    pipeline = load_pipeline(base, **OPTIONS)
    torch.manual_seed(0)
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    for part in parts:
        for parameter in getattr(pipeline, part).parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    tensors = original_weights(pipeline)
    assert "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight" in tensors
    save_file(tensors, tmp_path / "fine_tune.safetensors")
    found = load_pipeline(str(tmp_path / "fine_tune.safetensors"), base=base, **OPTIONS)
    for part in parts:
        assert torch.equal(weights_of(getattr(found, part)), weights_of(getattr(pipeline, part)))
    assert found.tokenizer_2("a cat")["input_ids"] == pipeline.tokenizer_2("a cat")["input_ids"]


@pytest.mark.parametrize("lost", [
    "model.diffusion_model", "model.diffusion_model.middle_block.1", "first_stage_model",
    "conditioner", "conditioner.embedders.1.model.ln_final",
])  # fmt: skip
def test_a_single_file_that_lacks_weights_is_refused(tiny_pipelines, tmp_path, lost):
    base = str(tiny_pipelines["sdxl"])
    tensors = original_weights(load_pipeline(base, **OPTIONS))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "part.safetensors")
    named = r"part.safetensors'( lacks (a part|weights of)|: )"
    with pytest.raises(ModelError, match=named):
        load_pipeline(str(tmp_path / "part.safetensors"), base=base, **OPTIONS)


def test_families_whose_single_files_diffusers_cannot_read_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused = []
    for name, kind in PIPELINES.items():
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(ModelError) as error:
            load_pipeline(str(tmp_path / "model.safetensors"), base=str(tmp_path), **OPTIONS)
        if "diffusers reads from folders alone" in str(error.value):
            refused.append(kind)
    assert {"PixArtSigmaPipeline", "PixArtAlphaPipeline", "SanaPipeline"} <= set(refused)
    assert not {"StableDiffusionXLPipeline", "FluxPipeline"} & set(refused)


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    return str(tiny_transformers.pixart(tmp_path_factory.mktemp("pixart") / "pixart"))


@pytest.mark.parametrize(("bits", "layer", "least", "most"), [
    (8, "Linear8bitLt", 1e-4, 0.03), (4, "Linear4bit", 0.01, 0.3),
])  # fmt: skip
def test_a_text_encoder_in_fewer_bits(pixart, bits, layer, least, most):
    """T5 in fewer bits from its file to heatmaps; all else is as without."""
    spec = Synthesize(
        model=pixart, text_encoder_bits=bits, steps=2, size_hw=(32, 48), guidance=1.0,
        min_area=0.0, max_area=1.0,
    )  # fmt: skip
    found, plain = spec._load(), load_pipeline(pixart, **OPTIONS | {"scheduler": spec.scheduler})
    products = [
        type(module).__name__
        for name, module in found.text_encoder.named_modules()
        if name.endswith((".q", ".k", ".v", ".o", ".wi"))
    ]
    assert len(products) == 10 and set(products) == {layer}
    assert torch.equal(weights_of(found.transformer), weights_of(plain.transformer))
    embedded, expected = (
        pipeline.encode_prompt("a cat and a dog", do_classifier_free_guidance=False, device="cpu")
        for pipeline in (found, plain)
    )
    assert torch.equal(embedded[1], expected[1])
    gap = (embedded[0] - expected[0]).norm() / expected[0].norm()
    assert least < gap < most

    assert_tokens_are_nouns(found, found.tokenizer, found.text_encoder)
    assert_equals_slow(
        found, lambda *_: (0, 0), read_blocks=(0, 1, 2), calls=(0, 1), scheduler="dpm_solver++"
    )
    nouns = (Noun(text="cat", start=2, end=5), Noun(text="dog", start=12, end=15))
    prompt = Prompt(key="k", caption="a cat and a dog", nouns=nouns, source="test:0")
    (record,) = spec.build()(iter([prompt]))
    assert isinstance(record, ImageRecord)
    assert [region.noun.text for region in record.regions] == ["cat", "dog"]


def test_all_text_encoders_are_quantised_but_absent_ones(tmp_path):
    folder = str(tiny_transformers.sd3(tmp_path / "sd3", t5=False))
    found = load_pipeline(folder, text_encoder_bits=4, **OPTIONS | {"scheduler": "flow_euler"})
    for encoder in (found.text_encoder, found.text_encoder_2):
        kinds = {type(m).__name__ for n, m in encoder.named_modules() if n.endswith("_proj")}
        assert kinds == {"Linear4bit"}
    assert found.text_encoder_3 is None
    assert not any("bit" in type(module).__name__ for module in found.transformer.modules())


def test_four_bits_are_moved_with_their_model_and_eight_are_not(pixart):
    """Why `offload` goes with 4 bits alone, shown without a GPU."""
    options = OPTIONS | {"scheduler": "dpm_solver++"}
    four = load_pipeline(pixart, text_encoder_bits=4, **options)

    def generated():
        generator = Generator(four, settings_of(scheduler="dpm_solver++"))
        positions = [generator.positions(CAPTIONS[0], SPANS[0])]
        (one,) = generator.generate(CAPTIONS[:1], positions, [1])
        return one

    expected = generated()
    four.enable_model_cpu_offload(device="cpu")  # what `offload` calls; the CPU as the device
    assert type(four.text_encoder._hf_hook).__name__ == "CpuOffload"
    found = generated()
    np.testing.assert_array_equal(found.image_hwc, expected.image_hwc)
    np.testing.assert_allclose(found.heatmaps_nhw, expected.heatmaps_nhw, atol=1e-6)
    weight = four.text_encoder.encoder.block[0].layer[0].SelfAttention.q.weight
    assert weight.quant_state.absmax.device.type == "cpu"
    weight.to("meta")
    assert weight.quant_state.absmax.device.type == "meta"

    eight = load_pipeline(pixart, text_encoder_bits=8, **options).text_encoder
    weight = eight.encoder.block[0].layer[0].SelfAttention.q.weight
    assert weight.CB.data_ptr() == weight.data_ptr()
    # Other data in the same parameter, as when a model moves between a CPU and a GPU.
    eight._apply(lambda tensor: torch.empty_like(tensor.data).copy_(tensor.data))
    # bitsandbytes multiplies with CB, which stays where it was: offloading would free nothing.
    assert weight.CB.data_ptr() != weight.data_ptr()


def test_fewer_bits_without_the_library_say_what_to_install(pixart, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs bitsandbytes.*pip install 'ovref\[quantize\]'"):
        load_pipeline(pixart, text_encoder_bits=8, **OPTIONS)


def lora_file(path, names, network, prefix):
    """Random low-rank weights of these linear layers; returns name -> what they add up to."""
    tensors, sums = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name in names:
        rows, columns = network.get_submodule(name).weight.shape
        down = torch.randn(2, columns, generator=generator)
        up = torch.randn(rows, 2, generator=generator)
        tensors |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up}
        sums[name] = up @ down
    save_file(tensors, path)
    return sums


def test_loras_are_added_to_the_weights(sd1, tmp_path):
    plain = load_pipeline(sd1, **OPTIONS).unet
    part = "mid_block.attentions.0.transformer_blocks.0"
    names = [f"{part}.attn1.to_q", f"{part}.attn2.to_k"]
    sums = lora_file(tmp_path / "lora.safetensors", names, plain, "unet")
    loras = (Lora(model=str(tmp_path / "lora.safetensors"), scale=0.5),
             Lora(model=str(tmp_path), file="lora.safetensors", scale=0.25))  # fmt: skip
    found = load_pipeline(sd1, loras=loras, **OPTIONS).unet
    for name in names:
        expected = plain.get_submodule(name).weight + 0.75 * sums[name]
        torch.testing.assert_close(found.get_submodule(name).weight, expected)
    assert [name for name, _ in found.named_modules()] == [n for n, _ in plain.named_modules()]
    changed = [
        name for name, parameter in found.named_parameters()
        if not torch.equal(parameter, plain.get_parameter(name))
    ]  # fmt: skip
    assert changed == [f"{name}.weight" for name in names]


def test_a_lora_of_a_transformer(tmp_path):
    folder = tiny_transformers.sd3(tmp_path / "sd3", t5=False)
    options = OPTIONS | {"scheduler": "flow_euler"}
    plain = load_pipeline(str(folder), **options).transformer
    name = "transformer_blocks.1.attn.add_k_proj"
    sums = lora_file(tmp_path / "lora.safetensors", [name], plain, "transformer")
    lora = Lora(model=str(tmp_path / "lora.safetensors"))
    found = load_pipeline(str(folder), loras=(lora,), **options).transformer
    expected = plain.get_submodule(name).weight + sums[name]
    torch.testing.assert_close(found.get_submodule(name).weight, expected)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("lora.bin", b"", "is no .safetensors file"),
        ("lora.safetensors", b"no weights", "cannot add the LoRA"),
        ("absent.safetensors", None, "cannot add the LoRA"),
    ],
)
def test_loras_that_cannot_be_read(sd1, tmp_path, name, content, named):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=named):
        load_pipeline(sd1, loras=(Lora(model=str(tmp_path / name)),), **OPTIONS)


def test_a_lora_of_another_model_is_refused(sd1, tmp_path):
    save_file(
        {"transformer.x.lora_A.weight": torch.zeros(2, 4),
         "transformer.x.lora_B.weight": torch.zeros(4, 2)},
        tmp_path / "lora.safetensors",
    )  # fmt: skip
    with pytest.raises(ModelError, match="has no weights for"):
        load_pipeline(sd1, loras=(Lora(model=str(tmp_path / "lora.safetensors")),), **OPTIONS)
