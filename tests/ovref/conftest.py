"""Tiny Stable Diffusion pipelines with random weights, in the real on-disk layouts."""

import json
from pathlib import Path

import pytest
import torch

MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "a n", "an d</w>"]


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


def _tokenizer(folder: Path, max_length: int):
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    letters = [chr(c) for c in _byte_characters()]
    vocab = letters + [letter + "</w>" for letter in letters]
    vocab += [merge.replace(" ", "") for merge in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = max_length
    return tokenizer


def _byte_characters() -> list[int]:
    """The printable stand-in of each byte in byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [byte if byte in printable else next(spare) for byte in range(256)]


def _text_encoder(tokenizer, projection: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


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
    tokenizer = _tokenizer(scratch / "tokenizer_sd1", 77)
    unet = _unet(
        block_out_channels=(16, 16, 24, 24),
        down_block_types=("CrossAttnDownBlock2D",) * 4,
        up_block_types=("CrossAttnUpBlock2D",) * 4,
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(tokenizer),
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
    tokenizer = _tokenizer(scratch / "tokenizer_sd2", 24)
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
        text_encoder=_text_encoder(tokenizer),
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
    tokenizer = _tokenizer(scratch / "tokenizer_sdxl", 77)
    tokenizer_2 = _tokenizer(scratch / "tokenizer_sdxl_2", 77)
    tokenizer_2.pad_token = "!"
    unet = _unet(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 32,
    )
    diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(tokenizer),
        text_encoder_2=_text_encoder(tokenizer_2, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder
