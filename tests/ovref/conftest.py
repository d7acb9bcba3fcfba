"""Tiny Stable Diffusion pipelines with random weights, in the real on-disk layouts."""

from pathlib import Path

import pytest
import torch

from tiny_transformers import clip_text_encoder, clip_tokenizer


@pytest.fixture(scope="session")
def tiny_pipelines(tmp_path_factory) -> dict[str, Path]:
    """Folders of three pipelines: `sd1` (77 keys), `sd2` (v-prediction, 24 keys) and `sdxl`.

    Latents are a quarter of the image; attention works at factors 1, 2, 4 and 8 of the latent in
    `sd1`, 1 and 2 in the others.
    """
    folder = tmp_path_factory.mktemp("tiny_pipelines")
    return {
        "sd1": _sd1(folder / "sd1", folder),
        "sd2": _sd2(folder / "sd2", folder),
        "sdxl": _sdxl(folder / "sdxl", folder),
    }


def _vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


def _unet(**options):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(sample_size=16, norm_num_groups=8, layers_per_block=1, **options)
    # Random attention is nearly uniform; sharper queries give maps that differ from place to place.
    for name, parameter in unet.named_parameters():
        if "attn2.to_q" in name or "attn2.to_k" in name:
            parameter.data *= 2
    return unet.eval()


def _sd1(folder: Path, scratch: Path) -> Path:
    import diffusers

    torch.manual_seed(1)
    tokenizer = clip_tokenizer(scratch / "tokenizer_sd1", 77)
    unet = _unet(
        block_out_channels=(16, 16, 24, 24),
        down_block_types=("CrossAttnDownBlock2D",) * 4,
        up_block_types=("CrossAttnUpBlock2D",) * 4,
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=clip_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _sd2(folder: Path, scratch: Path) -> Path:
    import diffusers

    torch.manual_seed(2)
    tokenizer = clip_tokenizer(scratch / "tokenizer_sd2", 24)
    unet = _unet(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
    )
    diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=clip_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def _sdxl(folder: Path, scratch: Path) -> Path:
    import diffusers

    torch.manual_seed(3)
    tokenizer = clip_tokenizer(scratch / "tokenizer_sdxl", 77)
    tokenizer_2 = clip_tokenizer(scratch / "tokenizer_sdxl_2", 77)
    tokenizer_2.pad_token = "!"
    unet = _unet(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=80,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 32,
    )
    diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=clip_text_encoder(tokenizer),
        # Wider than the first, as in the real model: loaders tell them apart by it.
        text_encoder_2=clip_text_encoder(tokenizer_2, projection=True, width=48),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder
