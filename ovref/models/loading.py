"""Loads text-to-image pipelines from the files that people have, without unpickling any."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from transformers import BitsAndBytesConfig

from ovref.errors import ModelError
from ovref.models.recorders import network_of, recorder_class
from ovref.models.schedulers import make_scheduler
from ovref_inference.models import model_errors, resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PIPELINES: Mapping[str, str] = {
    "StableDiffusionPipeline": "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "LatentConsistencyModelPipeline": "StableDiffusionPipeline",
    "LatentConsistencyModelImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline": "StableDiffusion3Pipeline",
    "StableDiffusion3Img2ImgPipeline": "StableDiffusion3Pipeline",
    "PixArtAlphaPipeline": "PixArtAlphaPipeline",
    "PixArtSigmaPipeline": "PixArtSigmaPipeline",
    "SanaPipeline": "SanaPipeline",
    "SanaSprintPipeline": "SanaSprintPipeline",
    "FluxPipeline": "FluxPipeline",
    "FluxImg2ImgPipeline": "FluxPipeline",
    "Flux2Pipeline": "Flux2Pipeline",
    "Flux2KleinPipeline": "Flux2KleinPipeline",
    "QwenImagePipeline": "QwenImagePipeline",
    "QwenImageImg2ImgPipeline": "QwenImagePipeline",
    "ZImagePipeline": "ZImagePipeline",
    "ZImageImg2ImgPipeline": "ZImagePipeline",
}
"""`_class_name` in model_index.json -> the text-to-image pipeline of the same parts."""


def load_pipeline(
    model: str,
    *,
    revision: str | None,
    scheduler: str,
    dtype: str,
    device: str,
    variant: str | None = None,
    base: str | None = None,
    loras: Any = (),
    offload: bool = False,
    text_encoder_bits: int | None = None,
) -> Any:
    """A text-to-image pipeline, without safety checker, watermark and progress bar.

    Only safetensors files are read, so nothing is unpickled.

    Args:
        model: `miniature:stable_diffusion`, a Hugging Face id, the path of a diffusers folder, or
            of a single `.safetensors` file with the weights of all parts.
        revision: revision of the Hugging Face repository; None for its default branch or a folder.
        scheduler: a key of `schedulers.SCHEDULERS`.
        dtype: a key of `DTYPES`.
        device: torch device, such as `cuda` or `cpu`.
        variant: of the weights: `fp16` for files named `*.fp16.safetensors`.
        base: for a single file, the diffusers folder or Hugging Face id of its base model, which
            gives configurations and tokenizers.
        loras: `ovref.stages.synthesize.Lora`s, added to the weights in this order.
        offload: keep each part in host memory while another one runs (not on a CPU).
        text_encoder_bits: quantise the text encoders to 8 bits (LLM.int8) or 4 (NF4), with
            bitsandbytes; not of a single file.

    Raises:
        ModelError: the model cannot be found, read or used for attribution.
    """
    path = resolve(model)
    named = f"the generator {model!r}" + (f" at revision {revision!r}" if revision else "")
    single_file = path.endswith((".safetensors", ".ckpt"))
    _check_file(path, base, named)
    if text_encoder_bits is not None and find_spec("bitsandbytes") is None:
        raise ModelError(
            f"text_encoder_bits={text_encoder_bits} needs bitsandbytes, which is not installed: "
            "run `pip install 'ovref[quantize]'`, or leave text_encoder_bits out"
        )
    described = (base or "") if single_file else path
    advice = (
        ". Expected a Hugging Face id that can be reached, or a folder with model_index.json and "
        f"safetensors files{_hint(path, variant)}"
    )
    with model_errors(f"load {named}", advice):
        index = diffusers.DiffusionPipeline.load_config(
            resolve(described), revision=None if single_file else revision
        )
        found = index["_class_name"]
        # Parts that a model was saved without, such as Stable Diffusion 3's T5.
        absent = [name for name, kind in index.items() if kind in ([None, None], (None, None))]
        options = {
            "dtype": DTYPES[dtype],
            **dict.fromkeys(absent),
            **_without_extras(found),
        }
        if single_file:
            pipeline = _from_file(found, path, named, config=resolve(described), **options)
        else:
            if text_encoder_bits is not None:
                encoders = [name for name in index if name.startswith("text_encoder")]
                options["quantization_config"] = diffusers.PipelineQuantizationConfig(
                    quant_mapping=dict.fromkeys(
                        [name for name in encoders if name not in absent],
                        _quantized(text_encoder_bits, DTYPES[dtype]),
                    )
                )
            pipeline = _class_of(found, named).from_pretrained(
                path, revision=revision, variant=variant, use_safetensors=True, **options
            )
    _check_text_to_image(pipeline, named)
    for lora in loras:
        _add_lora(pipeline, lora, named)
    pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if offload and torch.device(device).type != "cpu":
        pipeline.enable_model_cpu_offload(device=device)
        return pipeline
    return pipeline.to(device)


def _class_of(found: str, named: str) -> Any:
    """The class that loads a model whose file says `found`.

    Raises:
        ModelError: its attention cannot be read.
    """
    if found not in PIPELINES:
        raise ModelError(
            f"{named} is a {found}; attribution works with {', '.join(sorted(PIPELINES))}"
        )
    return getattr(diffusers, PIPELINES[found])


def _from_file(found: str, path: str, named: str, **options: Any) -> Any:
    """A pipeline of the class `found`, from a single file.

    Raises:
        ModelError: diffusers cannot read it, or it lacks weights.
    """
    kind = _class_of(found, named)
    if not hasattr(kind, "from_single_file"):
        raise ModelError(
            f"{named} is a single file of a {found}, which diffusers reads from folders alone: "
            "convert it to a folder in diffusers' layout, and leave out base"
        )
    try:
        pipeline = kind.from_single_file(path, **options)
    except SingleFileComponentError as error:
        raise ModelError(
            f"{named} lacks a part: {str(error).splitlines()[0]} Use a file with all parts, or a "
            "folder in diffusers' layout"
        ) from error
    # What the file has no weights for stays empty.
    empty = [
        name
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module) and any(t.is_meta for t in part.parameters())
    ]
    if empty:
        raise ModelError(
            f"{named} lacks weights of {' and '.join(sorted(empty))}, or has them under names that "
            "diffusers does not know: use a file with all parts, or a folder in diffusers' layout"
        )
    return pipeline


def _quantized(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How weights of linear layers are kept: LLM.int8 (Dettmers et al., NeurIPS 2022) in 8 bits,
    NF4 (QLoRA, Dettmers et al., NeurIPS 2023) in 4."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _without_extras(found: str) -> dict[str, Any]:
    """Options that leave out what only costs time."""
    kind = PIPELINES.get(found)
    if kind == "StableDiffusionPipeline":
        return {"safety_checker": None, "requires_safety_checker": False}
    return {"add_watermarker": False} if kind == "StableDiffusionXLPipeline" else {}


def _check_file(path: str, base: str | None, named: str) -> None:
    """Raises ModelError for a single file that would be unpickled or has no configurations."""
    if path.endswith(".ckpt"):
        raise ModelError(
            f"{named} is a pickled checkpoint, which is never read: convert it to .safetensors"
        )
    if path.endswith(".safetensors") and base is None:
        raise ModelError(
            f"{named} is a single file, which has no configurations and tokenizers: set base to "
            "the diffusers folder or Hugging Face id of the model that it was trained from"
        )
    if not path.endswith(".safetensors") and base is not None:
        raise ModelError(f"{named} is no single .safetensors file: base must be left out")


def _hint(path: str, variant: str | None) -> str:
    """What to set for a folder whose weights are there in another variant only."""
    if variant is not None or not Path(path).is_dir():
        return ""
    # diffusers names variants x.fp16.safetensors, and shards x.fp16-00001-of-00002.safetensors.
    parts = [file.name.split(".") for file in Path(path).glob("*/*.safetensors")]
    found = sorted({part[-2].split("-")[0] for part in parts if len(part) > 2})
    return f"; it has weights of variant {' and '.join(found)}: set variant" if found else ""


def _check_text_to_image(pipeline: Any, named: str) -> None:
    """Raises ModelError for a model that needs more input than text, or lacks a text encoder."""
    if pipeline.tokenizer is None or pipeline.text_encoder is None:
        raise ModelError(
            f"{named} has no first text encoder (an SDXL refiner?), whose tokens attribution "
            "refers to: use a base model"
        )
    if hasattr(pipeline, "unet"):
        channels, latents = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
        if channels != latents:
            raise ModelError(
                f"{named} has a UNet of {channels} input channels, expected the {latents} of its "
                "latents: models for inpainting, depth or editing need an image besides the text "
                "and cannot be used"
            )
    recorder_class(pipeline)


def _add_lora(pipeline: Any, lora: Any, named: str) -> None:
    """Adds a LoRA to the weights, so that nothing else is different from a model without.

    Raises:
        ModelError: it cannot be read, or belongs to another model.
    """
    path = Path(lora.model).expanduser()
    if path.is_file() and path.suffix != ".safetensors":
        raise ModelError(f"the LoRA {lora.model!r} is no .safetensors file, so it is not read")
    if not hasattr(pipeline, "load_lora_weights"):
        raise ModelError(f"{named} is a {type(pipeline).__name__}, which takes no LoRA")
    folder, file = str(path) if path.exists() else lora.model, lora.file
    if path.suffix == ".safetensors":
        folder, file = str(path.parent), path.name
    with model_errors(f"add the LoRA {lora.model!r} to {named}"):
        pipeline.load_lora_weights(
            folder, weight_name=file, revision=lora.revision, use_safetensors=True
        )
        if not pipeline.get_list_adapters():
            raise ModelError(
                f"the LoRA {lora.model!r} has no weights for {named}: it was trained for another "
                "model"
            )
        parts = [part for part in pipeline._lora_loadable_modules if getattr(pipeline, part, None)]
        pipeline.fuse_lora(components=parts, lora_scale=lora.scale)
        pipeline.unload_lora_weights()


def optimize_pipeline(
    pipeline: Any,
    *,
    compiled: bool,
    channels_last: bool,
    fused_projections: bool,
    cuda_graphs: bool = False,
) -> None:
    """Speeds up the pipeline in place; images change only by rounding.

    Args:
        pipeline: a pipeline of `load_pipeline`.
        compiled: compile network and decoder for every size they are called with: a UNet as one
            graph, a transformer block by block. It takes minutes the first time; later processes
            of the same user read the compiler's cache on the disk.
        channels_last: run their convolutions on channels-last memory.
        fused_projections: compute query, key and value of a UNet's self-attention in one product.
        cuda_graphs: launch compiled code as CUDA graphs where the compiler supports it.
    """
    network, vae = network_of(pipeline), pipeline.vae
    if fused_projections:
        # Not cross-attention: its keys come from few tokens, and attribution reads it.
        for name, module in network.named_modules():
            if name.endswith("attn1"):
                module.fuse_projections()
                module.set_processor(FusedAttnProcessor2_0())
    if channels_last:
        network.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)
    if compiled:
        # Kernels chosen by timing would differ between workers, and so would the bytes.
        options = {"deterministic": True, "triton.cudagraphs": cuda_graphs}
        known = torch._inductor.list_options()
        options = {name: value for name, value in options.items() if name in known}
        for part in [network] if hasattr(pipeline, "unet") else blocks_of(network):
            part.compile(fullgraph=True, dynamic=False, options=options)
        vae.decoder.compile(fullgraph=True, dynamic=False, options=options)


def blocks_of(network: Any) -> list[Any]:
    """The blocks of a diffusion transformer, which are alike, so that few graphs serve them all."""
    lists = [part for part in network.children() if isinstance(part, torch.nn.ModuleList)]
    return [block for blocks in lists for block in blocks]
