"""The miniature Stable Diffusion 3: a small instance of the real one's classes.

Only the transformer is new. The VAE and both text encoders are those of the shipped miniature: the
text encoder of its UNet and the text tower of its CLIP, with its projection. As in Stable
Diffusion 3 without T5, the text ends in `ZEROS` vectors of zeros.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ovref_miniature import weights_path

HEADS, HEAD_WIDTH, BLOCKS = 5, 32, 7
WIDTH = HEADS * HEAD_WIDTH
GRID = 16
"""Side of the grid of image positions: one for each position of the latents."""
ZEROS = 256
"""Vectors of zeros after CLIP's tokens: what the pipeline puts where T5's would be."""


def new_transformer():
    """SD3Transformer2DModel; as in SD 3.5, queries and keys are normalised.

    Modulations and the last layer start at zero, so that blocks begin as identities (DiT, arXiv
    2212.09748, section 3.2).
    """
    one, two = _text_config_1(), _text_config_2()
    model = SD3Transformer2DModel(
        sample_size=GRID,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=one.hidden_size + two.hidden_size,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=one.projection_dim + two.projection_dim,
        pos_embed_max_size=GRID,
        qk_norm="rms_norm",
    )
    layers = [norm.linear for b in model.transformer_blocks for norm in (b.norm1, b.norm1_context)]
    for layer in (*layers, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def pipeline_of(transformer):
    """A `StableDiffusion3Pipeline` of a transformer and the shipped parts, all float32."""
    folder = weights_path("stable_diffusion")
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    vae.register_to_config(shift_factor=0.0)  # which this pipeline wants to be a number
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=vae.eval(),
        text_encoder=_text_encoder_1(),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=_text_encoder_2(),
        tokenizer_2=CLIPTokenizer.from_pretrained(weights_path("clip")),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def save_stable_diffusion_3(folder, transformer):
    """Writes the pipeline of a transformer, as fp16 that runs in fp32."""
    pipeline = pipeline_of(transformer)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        path = Path(folder) / name / "config.json"
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # a place on this machine
        extra = {"dtype": "float32"} if name.startswith("text") else {}
        path.write_text(json.dumps(config | extra, indent=2) + "\n")


def _text_config_1():
    path = weights_path("stable_diffusion") / "text_encoder" / "config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("dtype",)}
    return CLIPTextConfig.from_dict(kept)


def _text_config_2():
    config = json.loads((weights_path("clip") / "open_clip_config.json").read_text())["model_cfg"]
    text, one = config["text_cfg"], _text_config_1()
    return CLIPTextConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["width"],
        intermediate_size=4 * text["width"],
        num_hidden_layers=text["layers"],
        num_attention_heads=text["heads"],
        max_position_embeddings=text["context_length"],
        projection_dim=config["embed_dim"],
        hidden_act="gelu",
        bos_token_id=one.bos_token_id,
        eos_token_id=one.eos_token_id,
        pad_token_id=0,
    )


def _text_encoder_1():
    """The text encoder of the miniature's UNet, projected by the identity."""
    config = _text_config_1()
    state = load_file(weights_path("stable_diffusion") / "text_encoder" / "model.safetensors")
    return _filled(config, state | {"text_projection.weight": torch.eye(config.hidden_size)})


def _text_encoder_2():
    """The text tower of the miniature's CLIP, from open_clip's names to those of transformers."""
    source = load_file(weights_path("clip") / "open_clip_model.safetensors")
    config = _text_config_2()
    state = {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "text_projection.weight": source["text_projection"].T,
    }
    renamed = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
               "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    for kind in ("weight", "bias"):
        state[f"final_layer_norm.{kind}"] = source[f"ln_final.{kind}"]
        for i in range(config.num_hidden_layers):
            there, here = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            for old, new in renamed.items():
                state[f"{here}.{new}.{kind}"] = source[f"{there}.{old}.{kind}"]
            parts = source[f"{there}.attn.in_proj_{kind}"].chunk(3)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                state[f"{here}.self_attn.{name}.{kind}"] = part
    return _filled(config, state)


def _filled(config, state):
    """A CLIPTextModelWithProjection of these weights, float32."""
    model = CLIPTextModelWithProjection(config)
    # Versions of transformers nest the text model differently.
    own = {name.rpartition("text_model.")[2]: name for name in model.state_dict()}
    model.load_state_dict({own[name]: value.float() for name, value in state.items()})
    return model.eval()
