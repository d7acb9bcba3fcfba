"""The models of the miniature, untrained: small instances of the real libraries' own classes.

Widths and depths live here and nowhere else. Each `save_*` writes the on-disk layout of the real
model (fp16 safetensors), so that the code that loads the real one loads this one.
"""

import json
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BitImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from ovref.miniature.shapes import CLASSES
from recipes.miniature.tokenizer import BEGIN, CONTEXT, END, VOCABULARY, save_tokenizer

IMAGE_SIZE = 64
IMAGE_MEAN, IMAGE_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
TEXT_WIDTH = 96
VIT_WIDTH = 96
"""Width of the patch features of DINOv2 and DINO."""

CLIP_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": IMAGE_SIZE,
        "layers": 4,
        "width": 128,
        "head_width": 32,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "hf_tokenizer_name": "./",
        "width": 96,
        "heads": 3,
        "layers": 3,
    },
}  # fmt: skip
"""open_clip model configuration."""
CONVNEXT_CONFIG = {
    **CLIP_CONFIG,
    "vision_cfg": {
        "image_size": IMAGE_SIZE,
        "timm_model_name": "test_convnext2",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "mlp",
    },
}
"""The same with one of timm's smallest ConvNeXts as the image tower: four maps, 32 to 128 wide."""


def new_vae():
    """AutoencoderKL: 64 px RGB in [-1, 1] <-> (4, 16, 16) latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def new_unet():
    """UNet2DConditionModel with cross-attention at 16x16 and at 8x8."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # diffusers takes this as the number of heads
        norm_num_groups=16,
    )


def new_text_encoder():
    """CLIPTextModel that conditions the UNet."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=BEGIN,
            eos_token_id=END,
            pad_token_id=END,
        )
    )


def new_scheduler():
    """DDIM on Stable Diffusion's noise schedule, predicting velocity."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def new_clip():
    """open_clip CLIP: ViT with patch 8 and a causal text transformer."""
    return open_clip.CLIP(**CLIP_CONFIG)


def new_clip_convnext():
    """open_clip CLIP with a ConvNeXt; all else has the shape of `new_clip`'s and is not trained."""
    model = open_clip.CLIP(**CONVNEXT_CONFIG)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("visual."))
    return model


def _vit_shape():
    return {
        "hidden_size": VIT_WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
    }


def new_dinov2():
    """Dinov2Model: patch 4, so 16x16 patch tokens on 64 px."""
    return Dinov2Model(Dinov2Config(**_vit_shape(), mlp_ratio=3, layerscale_value=0.3))


def new_dino():
    """ViTModel of the same shape, without a pooler, as DINO is published."""
    config = ViTConfig(**_vit_shape(), intermediate_size=3 * VIT_WIDTH, qkv_bias=True)
    return ViTModel(config, add_pooling_layer=False)


class Classifier(nn.Module):
    """Plain convolutional multi-label classifier, unlike any of the models that it evaluates."""

    def __init__(self):
        super().__init__()
        layers = []
        for wide, narrow in ((16, 3), (32, 16), (64, 32), (96, 64)):
            layers += [nn.Conv2d(narrow, wide, 3, 1, 1), nn.BatchNorm2d(wide), nn.ReLU(),
                       nn.Conv2d(wide, wide, 3, 2, 1), nn.BatchNorm2d(wide), nn.ReLU()]  # fmt: skip
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * 96, len(CLASSES))

    def forward(self, images_nchw):
        """float32 (n, 3, 64, 64) in [-1, 1] -> logits (n, classes)."""
        features = self.body(images_nchw)
        return self.head(torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1))


def save_float32_config(folder):
    """Weights are stored as fp16 but run in fp32 by default."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config.pop("torch_dtype", None)
    path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")


def save_stable_diffusion(folder, vae, unet, text_encoder):
    """Writes a `StableDiffusionPipeline` folder. The modules are left as they were."""
    tokenizer = save_tokenizer(Path(folder) / "tokenizer", pad="<|endoftext|>")
    pipeline = StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer,
        scheduler=new_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder)
    pipeline.to(dtype=torch.float32)
    save_float32_config(Path(folder) / "text_encoder")


def save_clip(folder, model, config=CLIP_CONFIG):
    """Writes an open_clip folder, for `local-dir:<folder>`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": list(IMAGE_MEAN), "std": list(IMAGE_STD), "interpolation": "bicubic",
                  "resize_mode": "shortest"}  # fmt: skip
    described = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described, indent=2) + "\n")
    # "!" has id 0, which is what open_clip's own tokenizer pads with.
    save_tokenizer(folder, pad="!")
    save_state(folder / "open_clip_model.safetensors", model)


def save_vit(folder, model, half=True):
    """Writes a transformers folder of a Dinov2Model or ViTModel."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    common = {"image_mean": list(IMAGE_MEAN), "image_std": list(IMAGE_STD), "resample": 3}
    if isinstance(model, Dinov2Model):
        processor = BitImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=size, do_center_crop=True, **common
        )
    else:
        processor = ViTImageProcessorPil(size=size, **common)
    model.to(torch.float16).save_pretrained(folder)
    model.to(torch.float32)
    processor.save_pretrained(folder)
    save_float32_config(folder)


def save_state(path, model):
    """Writes the parameters and buffers of a module as fp16 safetensors."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata={"format": "pt"})
