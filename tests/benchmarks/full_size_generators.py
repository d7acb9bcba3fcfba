"""Generators at full size with random weights, from a caption to an image and its heatmaps.

The configurations are those of diffusers' own conversion scripts (PixArt-Sigma XL/2 for 1024
pixels, Sana 600M for 512 pixels with dc-ae-f32c32-sana-1.0, FLUX.2-klein-4B) and of T5 v1.1 XXL,
gemma-2-2b-it and Qwen3-4B. Weights of blocks are kept in bfloat16 and brought to float32 one block
at a time (diffusers' layerwise casting), because this CPU multiplies nothing else fast. The text
encoder runs first, through the pipeline's own `encode_prompt`, and is freed; the pipeline's call
then gets what it returned. Images are generated twice: as a build does it, and by the pipeline
alone with softmax attention written out in float64, from which the reference heatmaps are. The
tokenizers are tiny ones of the real kinds, so texts have more tokens than in practice.
"""

import gc
import inspect
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook
from transformers.initialization import no_init_weights

from bench import presets
from memory import peak_bytes, reset_peak
from ovref.models.diffusion import Generator, to_uint8
from ovref.models.recorders import recorder_of
from ovref.models.schedulers import make_scheduler
from ovref.stages.synthesize import Synthesize

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
import tiny_transformers
from slow_attribution import CAPTIONS, SPANS, ExplicitAttention

CAPTION, NOUNS = CAPTIONS[0], SPANS[0]
POOL = 1_000_003


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a pipeline is made of."""

    pipeline: Any
    vae: Any
    scheduler: Any
    tokenizer: Any
    text_encoder: Any
    """Makes it."""
    text_blocks: str
    """Path of the list of its blocks."""
    network: Any
    """Makes it."""
    block_lists: tuple[str, ...]
    encode: dict[str, Any]
    """Arguments of `encode_prompt` besides the caption, as the pipeline's call gives them."""
    settings: dict[str, Any]


def _pixart_sigma() -> Parts:
    tokenizer = tiny_transformers.t5_tokenizer(512)
    t5 = transformers.T5Config(vocab_size=32128, **presets.T5_XXL)
    return Parts(
        pipeline=diffusers.PixArtSigmaPipeline,
        vae=lambda: diffusers.AutoencoderKL(**presets.VAE, scaling_factor=0.13025),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        tokenizer=tokenizer,
        text_encoder=lambda: transformers.T5EncoderModel(t5),
        text_blocks="encoder.block",
        network=lambda: diffusers.PixArtTransformer2DModel(
            sample_size=128, caption_channels=4096, interpolation_scale=2,
            use_additional_conditions=False,
        ),
        block_lists=("transformer_blocks",),
        encode={"do_classifier_free_guidance": False, "max_sequence_length": 300},
        settings={"scheduler": "dpm_solver++", "steps": 2, "guidance": 1.0, "size_hw": (448, 576)},
    )  # fmt: skip


def _sana_600m() -> Parts:
    gemma = transformers.Gemma2Config(
        vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256,
    )  # fmt: skip
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    call = inspect.signature(diffusers.SanaPipeline.__call__).parameters
    instruction = call["complex_human_instruction"].default
    tokenizer = tiny_transformers.gemma_tokenizer()
    # The instruction would be 2,000 tokens of letters otherwise.
    words = sorted(set(re.findall(r"\w{4,}", "\n".join(instruction))))
    tokenizer.add_tokens(
        [transformers.AddedToken(word, single_word=True, normalized=False) for word in words]
    )
    return Parts(
        pipeline=diffusers.SanaPipeline,
        vae=lambda: diffusers.AutoencoderDC(
            encoder_block_types=kinds, decoder_block_types=kinds, scaling_factor=0.41407,
            upsample_block_type="interpolate", downsample_block_type="conv",
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        tokenizer=tokenizer,
        text_encoder=lambda: transformers.Gemma2Model(gemma),
        text_blocks="layers",
        network=lambda: diffusers.SanaTransformer2DModel(
            num_attention_heads=36, attention_head_dim=32, num_layers=28,
            num_cross_attention_heads=16, cross_attention_head_dim=72, cross_attention_dim=1152,
            sample_size=16,
        ),
        block_lists=("transformer_blocks",),
        encode={
            "do_classifier_free_guidance": True,
            "max_sequence_length": 300,
            "complex_human_instruction": instruction,
        },
        settings={"scheduler": "dpm_solver++", "steps": 2, "guidance": 4.5, "size_hw": (192, 256)},
    )  # fmt: skip


def _flux2_klein_4b() -> Parts:
    qwen = transformers.Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    return Parts(
        pipeline=diffusers.Flux2KleinPipeline,
        vae=diffusers.AutoencoderKLFlux2,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        tokenizer=tiny_transformers.qwen_tokenizer(),
        text_encoder=lambda: transformers.Qwen3ForCausalLM(qwen),
        text_blocks="model.layers",
        network=lambda: diffusers.Flux2Transformer2DModel(
            in_channels=128, num_layers=5, num_single_layers=20, attention_head_dim=128,
            num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False,
        ),
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        encode={"max_sequence_length": 512},
        settings={"scheduler": "flow_euler", "steps": 1, "guidance": 1.0, "size_hw": (192, 256)},
    )  # fmt: skip


GENERATORS = {
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": _pixart_sigma,
    "Efficient-Large-Model/Sana_600M_512px_diffusers": _sana_600m,
    "black-forest-labs/FLUX.2-klein-4B": _flux2_klein_4b,
}


def measure(name: str) -> dict[str, Any]:
    """Makes and runs one generator; a dictionary of facts."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    parts = GENERATORS[name]()
    encoded, found = encode(parts)
    gc.collect()  # pipelines hold themselves
    return {"generator": name} | found | generate(parts, encoded)


def _pipeline(parts: Parts, text_encoder: Any) -> Any:
    scheduler = make_scheduler(parts.settings["scheduler"], parts.scheduler.config)
    pipeline = parts.pipeline(
        vae=parts.vae().eval(), text_encoder=text_encoder, tokenizer=parts.tokenizer,
        transformer=None, scheduler=scheduler,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encode(parts: Parts) -> tuple[Any, dict[str, Any]]:
    """What `encode_prompt` returns, and facts about it."""
    text_encoder = _by_blocks(parts.text_encoder, [parts.text_blocks])
    pipeline = _pipeline(parts, text_encoder)
    reset_peak()
    cpu = time.process_time()
    encoded = pipeline.encode_prompt(CAPTION, device="cpu", **parts.encode)
    return encoded, {
        "text_encoder": type(text_encoder).__name__,
        "text_parameters": _count(text_encoder),
        **_cost("text", cpu),
    }


def generate(parts: Parts, encoded: Any) -> dict[str, Any]:
    """Facts about an image, its heatmaps, and the explicit ones."""
    settings = Synthesize(model="given", batch_size=1, **parts.settings)
    pipeline = _pipeline(parts, None)
    pipeline.encode_prompt = lambda *_, **__: encoded
    network = _sharpened(_by_blocks(parts.network, parts.block_lists))
    pipeline.register_modules(transformer=network)
    generator, recorder = Generator(pipeline, settings), recorder_of(pipeline)
    positions = [generator.positions(CAPTION, NOUNS)]
    reset_peak()
    cpu = time.process_time()
    (generated,) = generator.generate([CAPTION], positions, [1])
    cost = _cost("generation", cpu)

    grid_hw = recorder.grid_hw(settings.size_hw)
    reading, read = generator.provenance["reading"], recorder.read_blocks(settings)
    with ExplicitAttention(
        network, recorder.attentions(), positions, grid_hw, recorder.layout.starts,
        recorder.layout.conditional,
    ) as explicit:  # fmt: skip
        height, width = settings.size_hw
        pixels = pipeline(
            prompt=[CAPTION], num_inference_steps=settings.steps, height=height, width=width,
            output_type="pt", generator=[torch.Generator().manual_seed(1)],
            **recorder.options([CAPTION], settings),
        ).images  # fmt: skip
    counted = [call for call, is_read in enumerate(recorder.counted(settings)) if is_read]
    expected = torch.stack([
        explicit.maps[block, call][reading == "output"][0] for block in read for call in counted
    ]).mean(0)  # fmt: skip
    if reading == "output":
        expected = expected - expected.amin(1, keepdim=True)
    expected = expected.unflatten(1, grid_hw).numpy()
    gap = abs(generated.heatmaps_nhw - expected).max(axis=(1, 2))
    bare = to_uint8(pixels)[0][0].numpy()
    return cost | {
        "network": type(network).__name__,
        "parameters": _count(network),
        "size_hw": list(settings.size_hw),
        "grid_hw": list(grid_hw),
        "steps": settings.steps,
        "guidance": settings.guidance,
        "reading": reading,
        "blocks": list(read),
        "finite": generated.image_hwc is not None,
        "same_image": generated.image_hwc is not None and bool((generated.image_hwc == bare).all()),
        "largest_gap_of_range": float((gap / (expected.max((1, 2)) - expected.min((1, 2)))).max()),
    }


def _by_blocks(build: Any, lists: Any) -> Any:
    """A model with random weights whose blocks keep them in bfloat16 and compute in float32."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():
            model = build()
    finally:
        torch.set_default_dtype(torch.float32)
    if isinstance(model, transformers.PreTrainedModel):
        model.tie_weights()
    _fill(model)
    blocks = [block for path in lists for block in model.get_submodule(path)]
    inside = {id(weight) for block in blocks for weight in block.parameters()}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in inside:
            tensor.data = tensor.data.float()
    for block in blocks:
        apply_layerwise_casting_hook(block, torch.bfloat16, torch.float32, non_blocking=False)
    return model.eval().requires_grad_(False)


def _fill(model: Any) -> None:
    """Random matrices and kernels that keep the size of activations; scales of 1 and no biases.

    Billions of normal numbers would take minutes: all are cut from one list, whose prime length
    lets no two rows be the same.
    """
    pool = torch.randn(POOL)
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            weight.data.fill_(float(name.endswith("weight")))
            continue
        values = (pool * weight[0].numel() ** -0.5).to(weight.dtype)
        flat = weight.data.view(-1)
        for start in range(0, len(flat), POOL):
            part = flat[start : start + POOL]
            part.copy_(values[: len(part)])


def _sharpened(network: Any) -> Any:
    """Random attention is nearly uniform; sharper queries give maps that differ by place."""
    for name, weight in network.named_parameters():
        if "attn2.to_q." in name or "attn.norm_q." in name or "attn.norm_added_q." in name:
            weight.data *= 3
    return network


def _count(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters())


def _cost(name: str, started: float) -> dict[str, float]:
    return {
        f"cpu_seconds_{name}": round(time.process_time() - started, 1),
        f"peak_gb_{name}": round(peak_bytes() / 1e9, 2),
    }
