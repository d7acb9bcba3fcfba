"""The table of known models, as data: importable without torch.

Each entry names a published model, the class of its library and the sizes of its network, so that a
model of the same architecture, with random weights and in the same layout on disk, can be made
without a download (`random_weights`). `tiny` shrinks it for tests.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Library = Literal["transformers", "open_clip", "timm"]
Role = Literal["visual", "text"]


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A published model, and what its network is."""

    model: str
    """As in a configuration: hub id, or `<architecture>:<tag>` of open_clip."""
    library: Library = "transformers"
    """The library that loads it."""
    roles: tuple[Role, ...] = ("visual",)
    """What it can be in a configuration."""
    network: str
    """transformers: class of the model. open_clip, timm: name of the architecture."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """transformers: fields of its configuration, where they differ from the class's own; others:
    arguments of the architecture."""
    tiny: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `config` for a test, merged into it."""
    tiny_trunk: Mapping[str, Any] = field(default_factory=dict)
    """open_clip with a tower of timm: arguments of that tower for a test."""
    processor: Mapping[str, Any] = field(default_factory=dict)
    """transformers: fields of `preprocessor_config.json`."""
    joint: bool = False
    """Whether features `values` are in the space of texts."""
    keys: bool = True
    """Whether features `keys` are offered."""
    note: str = ""
    """What a user should know."""


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
PLAIN = {"do_normalize": False, "resample": 2}
LARGE = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096,
}  # fmt: skip
HUGE = LARGE | {"hidden_size": 1280, "num_hidden_layers": 32, "intermediate_size": 5120}
TINY = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
TINY_TEXT = TINY | {"vocab_size": 512}
TINY_VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2}
SMALL_TEXT = {"width": 32, "heads": 2, "layers": 2}
GATED = "access to the weights must be asked for"


def _vit(**fields: Any) -> dict[str, Any]:
    return {"image_processor_type": "ViTImageProcessor", "resample": 2, **fields}


VISUAL = (
    KnownModel(
        model="facebook/dinov3-vitl16-pretrain-lvd1689m",
        network="DINOv3ViTModel",
        config=LARGE | {"num_register_tokens": 4, "key_bias": False},
        tiny=TINY,
        processor={"image_processor_type": "DINOv3ViTImageProcessor", **IMAGENET},
        note=f"{GATED}; not in float16; any multiple of 16",
    ),
    KnownModel(
        model="facebook/dinov3-convnext-large-pretrain-lvd1689m",
        network="DINOv3ConvNextModel",
        config={"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3]},
        tiny={"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1]},
        processor={"image_processor_type": "DINOv3ViTImageProcessor", **IMAGENET},
        keys=False,
        note=f"{GATED}; a cell has 32 pixels; layer -1 only",
    ),
    KnownModel(
        model="timm/vit_large_patch16_dinov3.lvd1689m",
        library="timm",
        network="vit_large_patch16_dinov3",
        tiny=TINY_VIT,
        note="the same weights as facebook's, and its licence; not in float16",
    ),
    KnownModel(
        model="facebook/dinov2-large",
        network="Dinov2Model",
        config=LARGE | {"patch_size": 14, "image_size": 518},
        tiny=TINY | {"image_size": 70},
        processor={"image_processor_type": "BitImageProcessor", "resample": 3, **IMAGENET},
        note="FOSSIL's backbone",
    ),
    KnownModel(
        model="facebook/dinov2-with-registers-large",
        network="Dinov2WithRegistersModel",
        config=LARGE | {"num_register_tokens": 4, "patch_size": 14, "image_size": 518},
        tiny=TINY | {"image_size": 70},
        processor={"image_processor_type": "BitImageProcessor", "resample": 3, **IMAGENET},
    ),
    KnownModel(
        model="nvidia/C-RADIOv3-L",
        network="RadioModel",
        config=LARGE | {"num_cls_tokens": 3, "num_registers": 7, "layerscale_value": 1.0},
        tiny=TINY | {"max_img_size": 128},
        processor=_vit(**PLAIN),
        note="normalises images itself; 3 class and 7 register tokens; up to 2048 pixels; no text; "
        "loaded by transformers' own class, code of the repository is never run",
    ),
    KnownModel(
        model="timm/vit_large_patch16_radio_v3.c_radio",
        library="timm",
        network="vit_large_patch16_radio_v3",
        tiny=TINY_VIT | {"img_size": 64},
        note="the same weights as NVIDIA's, in a layout that needs no code of theirs; positions "
        "are RADIO's at 512 x 512 and interpolated from those elsewhere",
    ),
    KnownModel(
        model="facebook/vit-mae-large",
        network="ViTMAEModel",
        config=LARGE,
        tiny=TINY | {"image_size": 64},
        processor=_vit(**IMAGENET),
        note="nothing is masked",
    ),
    KnownModel(
        model="facebook/ijepa_vith14_1k",
        network="IJepaModel",
        config=HUGE | {"patch_size": 14},
        tiny=TINY | {"image_size": 56},
        processor=_vit(**IMAGENET),
        note="no class token",
    ),
    KnownModel(
        model="timm/vit_pe_spatial_large_patch14_448.fb",
        library="timm",
        network="vit_pe_spatial_large_patch14_448",
        tiny=TINY_VIT | {"img_size": 56},
        note="PE-Spatial has no text",
    ),
    KnownModel(
        model="timm/vit_large_patch16_224.mae",
        library="timm",
        network="vit_large_patch16_224",
        tiny=TINY_VIT | {"img_size": 64},
    ),
    KnownModel(
        model="timm/vit_huge_patch14_gap_224.in1k_ijepa",
        library="timm",
        network="vit_huge_patch14_gap_224",
        tiny=TINY_VIT | {"img_size": 56},
        note="the average pool's norm is not applied to patches",
    ),
    KnownModel(
        model="timm/convnext_large.dinov3_lvd1689m",
        library="timm",
        network="convnext_large",
        tiny={"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)},
        keys=False,
        note="a cell has 32 pixels; without the last norm, which timm has after its pool; layer -1 "
        "only",
    ),
)

JOINT = (
    KnownModel(
        model="google/tipsv2-l14",
        roles=("visual", "text"),
        network="Tipsv2Model",
        config={
            "vision_config": {key: LARGE[key] for key in LARGE if key != "intermediate_size"},
            "text_config": LARGE | {"num_hidden_layers": 12},
        },
        tiny={
            "vision_config": TINY | {"image_size": 56},
            "text_config": TINY_TEXT,
        },
        processor={"image_processor_type": "Tipsv2ImageProcessor", **PLAIN},
        joint=True,
        note="one permissive model for images and texts; features 'tokens' are in the space of "
        "texts, too; texts of 64 tokens, lower case",
    ),
    KnownModel(
        model="google/siglip2-large-patch16-256",
        roles=("visual", "text"),
        network="SiglipModel",
        config={
            "vision_config": LARGE | {"image_size": 256},
            "text_config": LARGE | {"vocab_size": 256000},
        },
        tiny={"vision_config": TINY | {"image_size": 64}, "text_config": TINY_TEXT},
        processor={"image_processor_type": "SiglipImageProcessor", "resample": 2, **HALF},
        joint=True,
        note="no class token; texts of 64 tokens, lower case, padding not masked",
    ),
    KnownModel(
        model="google/siglip2-base-patch16-naflex",
        roles=("visual", "text"),
        network="Siglip2Model",
        config={"text_config": {"vocab_size": 256000}},
        tiny={"vision_config": TINY | {"num_patches": 16}, "text_config": TINY_TEXT},
        processor={"image_processor_type": "Siglip2ImageProcessor", "resample": 2, **HALF},
        joint=True,
        note="any aspect ratio; texts as of SigLIP2",
    ),
    KnownModel(
        model="facebook/metaclip-2-worldwide-b16",
        roles=("visual", "text"),
        network="MetaClip2Model",
        config={
            "vision_config": {"patch_size": 16},
            "text_config": {"vocab_size": 901629, "eos_token_id": 2, "bos_token_id": 0},
            "projection_dim": 512,
        },
        tiny={
            "vision_config": TINY | {"image_size": 64, "projection_dim": 24},
            "text_config": TINY_TEXT | {"projection_dim": 24},
            "projection_dim": 24,
        },
        processor={"image_processor_type": "CLIPImageProcessor", "resample": 3, **OPENAI},
        joint=True,
        note="texts of 300 languages",
    ),
    KnownModel(
        model="openai/clip-vit-large-patch14",
        roles=("visual", "text"),
        network="CLIPModel",
        config={
            "vision_config": LARGE | {"patch_size": 14, "projection_dim": 768},
            "text_config": {
                "hidden_size": 768,
                "num_attention_heads": 12,
                "intermediate_size": 3072,
                "projection_dim": 768,
            },
            "projection_dim": 768,
        },
        tiny={
            "vision_config": TINY | {"image_size": 56, "projection_dim": 24},
            "text_config": TINY_TEXT | {"projection_dim": 24, "eos_token_id": 2},
            "projection_dim": 24,
        },
        processor={"image_processor_type": "CLIPImageProcessor", "resample": 3, **OPENAI},
        joint=True,
    ),
    KnownModel(
        model="ViT-L-14:openai",
        library="open_clip",
        roles=("visual", "text"),
        network="ViT-L-14",
        tiny={
            "embed_dim": 24,
            "vision_cfg": {"image_size": 56, "width": 32, "head_width": 16, "layers": 3},
            "text_cfg": SMALL_TEXT,
        },
        joint=True,
    ),
    KnownModel(
        model="ViT-L-16-SigLIP2-256:webli",
        library="open_clip",
        roles=("visual", "text"),
        network="ViT-L-16-SigLIP2-256",
        tiny={
            "embed_dim": 32,
            "vision_cfg": {"image_size": 64},
            "text_cfg": SMALL_TEXT | {"vocab_size": 512},
        },
        tiny_trunk=TINY_VIT | {"img_size": 64},
        joint=True,
        note="patches go through the attention pool one by one; texts of 64 tokens, lower case",
    ),
    KnownModel(
        model="PE-Core-L-14-336:meta",
        library="open_clip",
        roles=("visual", "text"),
        network="PE-Core-L-14-336",
        tiny={"embed_dim": 24, "vision_cfg": {"image_size": 56}, "text_cfg": SMALL_TEXT},
        tiny_trunk=TINY_VIT | {"img_size": 56, "attn_pool_num_heads": 2},
        joint=True,
        note="patches go through the attention pool one by one; texts of 32 tokens",
    ),
    KnownModel(
        model="EVA02-L-14:merged2b_s4b_b131k",
        library="open_clip",
        roles=("visual", "text"),
        network="EVA02-L-14",
        tiny={"embed_dim": 24, "vision_cfg": {"image_size": 56}, "text_cfg": SMALL_TEXT},
        tiny_trunk=TINY_VIT | {"img_size": 56},
        joint=True,
    ),
    KnownModel(
        model="MobileCLIP2-S0:dfndr2b",
        library="open_clip",
        roles=("visual", "text"),
        network="MobileCLIP2-S0",
        tiny={"embed_dim": 24, "text_cfg": SMALL_TEXT},
        tiny_trunk={"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64)},
        note="a cell has 32 pixels; regions are pooled before the projection; layer -1 only, no "
        "'values'",
    ),
    KnownModel(
        model="MobileCLIP2-B:dfndr2b",
        library="open_clip",
        roles=("visual", "text"),
        network="MobileCLIP2-B",
        tiny={"embed_dim": 24, "vision_cfg": {"image_size": 64}, "text_cfg": SMALL_TEXT},
        tiny_trunk={"depth": 2, "img_size": 64},
        joint=True,
        note="convolutions before the layers; a patch has 16 pixels",
    ),
    KnownModel(
        model="convnext_large_d_320:laion2b_s29b_b131k_ft_soup",
        library="open_clip",
        roles=("visual", "text"),
        network="convnext_large_d_320",
        tiny={"embed_dim": 24, "vision_cfg": {"image_size": 64}, "text_cfg": SMALL_TEXT},
        tiny_trunk={"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)},
        note="a cell has 32 pixels; regions are pooled before the projection (FC-CLIP)",
    ),
)

ENCODERS = (*VISUAL, *JOINT)
"""Image and text encoders."""


def find(model: str) -> KnownModel | None:
    """The entry of a model id, or of another tag of a listed architecture of open_clip; None for
    one that is not listed."""
    wanted = model.removeprefix("hf-hub:")
    architecture, colon, _ = wanted.partition(":")
    for known in MODELS:
        if known.model == wanted:
            return known
        if colon and known.library == "open_clip" and known.network == architecture:
            return replace(known, model=wanted)
    return None


MODELS = ENCODERS
"""All entries."""
