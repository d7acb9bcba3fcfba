"""The miniature's SAM, GroundingDINO and MaskFormer, untrained, and how their folders are written.

As in `architectures`, every folder has the layout of the real model.
"""

from functools import partial

import torch
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from transformers import (
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    MaskFormerConfig,
    MaskFormerDetrConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessorPil,
    SamConfig,
    SwinConfig,
)

from ovref.miniature.shapes import CLASSES, UNSEEN
from ovref_inference.proposers.sam_model import from_segment_anything
from recipes.miniature.architectures import (
    IMAGE_MEAN,
    IMAGE_SIZE,
    IMAGE_STD,
    save_float32_config,
)
from recipes.miniature.word_pieces import LONGEST, save_tokenizer, vocabulary

SEEN = tuple(c for c in CLASSES if c not in UNSEEN)
"""Classes of MaskFormer, in the order of its labels."""

SAM = SamConfig(
    vision_config={
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "global_attn_indexes": [1, 3],
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        "window_size": 8,
        "output_channels": 96,
        "num_pos_feats": 48,
    },
    prompt_encoder_config={"hidden_size": 96, "image_size": IMAGE_SIZE, "patch_size": 4},
    mask_decoder_config={
        "hidden_size": 96,
        "mlp_dim": 256,
        "num_attention_heads": 4,
        "iou_head_hidden_dim": 96,
    },
)


def new_sam(config=SAM):
    """Sam of segment-anything, which it is trained as: 64 px, an embedding of 16x16, masks of
    64x64."""
    vision, decoder = config.vision_config, config.mask_decoder_config
    grid = vision.image_size // vision.patch_size
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=vision.image_size,
            patch_size=vision.patch_size,
            embed_dim=vision.hidden_size,
            depth=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            out_chans=vision.output_channels,
            norm_layer=partial(torch.nn.LayerNorm, eps=vision.layer_norm_eps),
            use_rel_pos=True,
            window_size=vision.window_size,
            global_attn_indexes=tuple(vision.global_attn_indexes),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=vision.output_channels,
            image_embedding_size=(grid, grid),
            input_image_size=(vision.image_size, vision.image_size),
            mask_in_chans=config.prompt_encoder_config.mask_input_channels,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=decoder.hidden_size,
            transformer=TwoWayTransformer(
                depth=decoder.num_hidden_layers,
                embedding_dim=decoder.hidden_size,
                num_heads=decoder.num_attention_heads,
                mlp_dim=decoder.mlp_dim,
            ),
            iou_head_depth=decoder.iou_head_depth,
            iou_head_hidden_dim=decoder.iou_head_hidden_dim,
        ),
    )


def save_sam(folder, model):
    """Writes a folder for transformers' SamModel, from a Sam of segment-anything."""
    _save_half(folder, from_segment_anything(model.state_dict(), SAM))


def new_grounding_dino():
    """GroundingDinoForObjectDetection: 64 px, features of 16x16, 8x8 and 4x4 cells, 40 boxes."""
    backbone = SwinConfig(
        image_size=IMAGE_SIZE,
        patch_size=2,
        embed_dim=32,
        depths=(2, 2, 2),
        num_heads=(1, 2, 4),
        window_size=8,
        mlp_ratio=3.0,
        drop_path_rate=0.0,
        out_features=["stage2", "stage3"],
    )
    text = BertConfig(
        vocab_size=len(vocabulary()),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=LONGEST,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config = GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        num_queries=40,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        num_feature_levels=3,
        dropout=0.0,
        fusion_droppath=0.0,
        max_text_len=LONGEST,
    )
    return GroundingDinoForObjectDetection(config)


def save_grounding_dino(folder, model):
    """Writes a folder for `GroundingDinoForObjectDetection` and `GroundingDinoProcessor`."""
    GroundingDinoImageProcessorPil(**_processing()).save_pretrained(folder)
    save_tokenizer(folder)
    _save_half(folder, model)


def new_maskformer():
    """MaskFormerForInstanceSegmentation: 64 px, masks of 32x32, 16 queries, the seen classes."""
    backbone = SwinConfig(
        image_size=IMAGE_SIZE,
        patch_size=2,
        embed_dim=24,
        depths=(2, 2, 2, 1),
        num_heads=(1, 2, 4, 8),
        window_size=8,
        mlp_ratio=3.0,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    decoder = MaskFormerDetrConfig(
        d_model=64,
        num_queries=16,
        decoder_layers=3,
        decoder_attention_heads=4,
        decoder_ffn_dim=192,
        encoder_attention_heads=4,
        dropout=0.0,
    )
    config = MaskFormerConfig(
        backbone_config=backbone,
        decoder_config=decoder,
        fpn_feature_size=64,
        mask_feature_size=64,
        id2label=dict(enumerate(SEEN)),
        label2id={name: i for i, name in enumerate(SEEN)},
    )
    return MaskFormerForInstanceSegmentation(config)


def save_maskformer(folder, model):
    """Writes a folder for `MaskFormerForInstanceSegmentation` and its image processor."""
    MaskFormerImageProcessorPil(**_processing(), num_labels=len(SEEN)).save_pretrained(folder)
    _save_half(folder, model)


def _processing():
    """Settings of an image processor: 64 px, pixels in [-1, 1], bilinear."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return {"size": size, "image_mean": list(IMAGE_MEAN), "image_std": list(IMAGE_STD),
            "resample": 2}  # fmt: skip


def _save_half(folder, model):
    model.to(torch.float16).save_pretrained(folder)
    model.to(torch.float32)
    save_float32_config(folder)
