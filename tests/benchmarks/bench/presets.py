"""Published configurations, built in full size with random weights.

Sources: the `config.json` files of stable-diffusion-v1-5, stable-diffusion-2-1-base and
stable-diffusion-xl-base-1.0 (UNet, VAE, text encoders), stable-diffusion-3.5-medium, dinov2-large,
clip-vit-large-patch14, grounding-dino-base and sam-vit-base. The tokenizer is CLIP's own, from
open_clip's package.
"""

import gzip
import json
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import open_clip
import torch
import transformers

from ovref.models.loading import load_pipeline
from ovref.models.schedulers import make_scheduler
from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.encoders.load import (
    TextEncoder,
    VisualEncoder,
    load_text_encoder,
    load_visual_encoder,
)
from ovref_inference.pixels import Pixels

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sd21": {
        "sample_size": 64,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Arguments of `UNet2DConditionModel`; what is left out is its default."""

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
"""Arguments of `AutoencoderKL`, the same for all three."""

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
          "num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu"}  # fmt: skip
OPENCLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
              "num_attention_heads": 16, "projection_dim": 512, "hidden_act": "gelu"}  # fmt: skip
OPENCLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
              "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip
TEXT = {"sd15": CLIP_L, "sd21": OPENCLIP_H, "sdxl": CLIP_L}
"""Arguments of `CLIPTextConfig`; SDXL has `OPENCLIP_G` besides."""

SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
"""Arguments of `SD3Transformer2DModel`."""

SD3_VAE = VAE | {
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
          "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # fmt: skip
"""Arguments of `T5Config`, T5 v1.1 XXL."""

SIZES_HW = {
    "miniature": (64, 64),
    "sd15": (512, 512),
    "sd21": (512, 512),
    "sdxl": (1024, 1024),
    "sd35_medium": (1024, 1024),
}
"""The size of the images that a preset generates."""

NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
"""Arguments of `DDIMScheduler`, the same for all three."""


def pipeline(preset: str, scheduler: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A text-to-image pipeline as `load_pipeline` gives it, with random weights.

    Args:
        preset: a key of `SIZES_HW`; the miniature alone is loaded, with its trained weights.
        scheduler: a key of `schedulers.SCHEDULERS`.
    """
    if preset == "miniature":
        return load_pipeline(
            "miniature:stable_diffusion",
            revision=None,
            scheduler=scheduler,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
        )
    if preset == "sd35_medium":
        return _sd35_medium(scheduler, dtype, device)
    tokenizer = clip_tokenizer()
    parts = {
        "vae": _made(lambda: diffusers.AutoencoderKL(**VAE), dtype, device),
        "unet": _made(lambda: unet(preset), dtype, device),
        "text_encoder": _made(
            lambda: transformers.CLIPTextModel(_text_config(TEXT[preset], tokenizer)), dtype, device
        ),
        "tokenizer": tokenizer,
        "scheduler": make_scheduler(scheduler, diffusers.DDIMScheduler(**NOISE).config),
    }
    if preset == "sdxl":
        found = diffusers.StableDiffusionXLPipeline(
            text_encoder_2=_made(
                lambda: transformers.CLIPTextModelWithProjection(
                    _text_config(OPENCLIP_G, tokenizer)
                ),
                dtype,
                device,
            ),
            tokenizer_2=tokenizer,
            add_watermarker=False,
            **parts,
        )
    else:
        found = diffusers.StableDiffusionPipeline(
            safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
        )
    found.set_progress_bar_config(disable=True)
    return found


def _sd35_medium(scheduler: str, dtype: torch.dtype, device: torch.device) -> Any:
    clip, t5 = clip_tokenizer(), _t5_tokenizer()

    def clip_text(shape: dict[str, Any]) -> Any:
        config = _text_config(shape, clip)
        return _made(lambda: transformers.CLIPTextModelWithProjection(config), dtype, device)

    t5_config = transformers.T5Config(vocab_size=32128, **T5_XXL)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    found = diffusers.StableDiffusion3Pipeline(
        transformer=_made(lambda: diffusers.SD3Transformer2DModel(**SD35_MEDIUM), dtype, device),
        vae=_made(lambda: diffusers.AutoencoderKL(**SD3_VAE), dtype, device),
        text_encoder=clip_text(CLIP_L),
        text_encoder_2=clip_text(OPENCLIP_G),
        text_encoder_3=_made(lambda: transformers.T5EncoderModel(t5_config), dtype, device),
        tokenizer=clip,
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5,
        scheduler=make_scheduler(scheduler, flow.config),
    )
    found.set_progress_bar_config(disable=True)
    return found


def blocks(preset: str) -> range:
    """The numbers of a transformer's blocks."""
    return range({"sd35_medium": SD35_MEDIUM["num_layers"]}[preset])


def unet(preset: str) -> Any:
    """The UNet of a published preset, in PyTorch's default dtype and on its default device."""
    return diffusers.UNet2DConditionModel(**UNETS[preset])


def encoders(
    preset: str, dtype: torch.dtype, device: torch.device, batch_size: int
) -> tuple[VisualEncoder, TextEncoder]:
    """What `Embed` needs: DINOv2 ViT-L/14 at 512 pixels and CLIP ViT-L/14, or the miniature's."""
    where = str(device)
    if preset == "miniature":
        return (
            load_visual_encoder(
                VisualEncoderConfig(model="miniature:dinov2", size_hw=(64, 64)),
                device=where,
                batch_size=batch_size,
            ),
            load_text_encoder(TextEncoderConfig(model="miniature:clip"), device=where),
        )
    model = _made(_dinov2_large, dtype, device)
    visual = VisualEncoder(
        forward=lambda pixels: model(pixel_values=pixels).last_hidden_state[:, 1:],
        dim=1024,
        size_hw=(518, 518),
        patch_size=14,
        images=Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", device, dtype),
        batch_size=batch_size,
    )
    clip = open_clip.create_model("ViT-L-14-quickgelu", pretrained=None).eval().to(device)
    images = Pixels.of_open_clip(clip, device, torch.float32)
    return visual, TextEncoder(clip, open_clip.get_tokenizer("ViT-L-14-quickgelu"), images, 256)


def backbones() -> dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, torch.Tensor]]]]:
    """Name -> what makes the model, and what makes the input of a forward pass of n images."""
    return {
        "dinov2_large": (_dinov2_large, lambda n: {"pixel_values": torch.randn(n, 3, 518, 518)}),
        "clip_large": (_clip_large, lambda n: {"pixel_values": torch.randn(n, 3, 224, 224)}),
        "grounding_dino_base": (_grounding_dino_base, _grounding_input),
        "sam_base": (
            lambda: transformers.SamModel(transformers.SamConfig()).vision_encoder,
            lambda n: {"pixel_values": torch.randn(n, 3, 1024, 1024)},
        ),
    }


def _dinov2_large() -> Any:
    return transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518,
            patch_size=14, mlp_ratio=4,
        )
    )  # fmt: skip


def _clip_large() -> Any:
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            image_size=224, patch_size=14, projection_dim=768,
        )
    )  # fmt: skip


def _grounding_dino_base() -> Any:
    backbone = transformers.SwinConfig(
        embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12,
        image_size=384, out_indices=[2, 3, 4],
    )  # fmt: skip
    config = transformers.GroundingDinoConfig(
        backbone_config=backbone, text_config=transformers.BertConfig()
    )
    return transformers.GroundingDinoForObjectDetection(config)


def _grounding_input(n: int) -> dict[str, torch.Tensor]:
    # "a cat. a dog." in BERT's ids: special tokens 101 and 102, the full stop 1012.
    ids = torch.tensor([[101, 1037, 4937, 1012, 1037, 3899, 1012, 102]]).expand(n, -1)
    return {
        "pixel_values": torch.randn(n, 3, 800, 800),
        "input_ids": ids,
        "token_type_ids": torch.zeros_like(ids),
        "attention_mask": torch.ones_like(ids),
    }


def _made(build: Callable[[], Any], dtype: torch.dtype, device: torch.device) -> Any:
    with torch.device(device):
        return build().eval().requires_grad_(False).to(dtype)


def _text_config(shape: dict[str, Any], tokenizer: Any) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=49408,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )


def _t5_tokenizer() -> Any:
    """T5's kind of tokenizer, with a piece for each letter and for a few words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(letter, -10.0) for letter in string.ascii_letters + string.digits + ",.-'"]
    pieces += [(f"\u2581{word}", -3.0) for word in ("a", "and", "of", "on", "the", "with")]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    tokenizer.model_max_length = 512
    return tokenizer


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """CLIP's tokenizer, 49,408 tokens, context of 77, from the list of merges in open_clip."""
    merges_file = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    with gzip.open(merges_file, "rt", encoding="utf-8") as file:
        # As open_clip and CLIP cut it: a header, and merges beyond the vocabulary's size.
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = json.dumps({token: number for number, token in enumerate(tokens)})
        (Path(folder) / "vocab.json").write_text(vocabulary, encoding="utf-8")
        text = "#version: 0.2\n" + "\n".join(merges) + "\n"
        (Path(folder) / "merges.txt").write_text(text, encoding="utf-8")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 77
    return tokenizer
