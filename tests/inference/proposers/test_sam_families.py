"""SAM 2, SAM-HQ and EdgeTAM: masks equal to those of transformers' own processors."""

import numpy as np
import pytest
import torch
from transformers import (
    EdgeTamConfig,
    EdgeTamModel,
    Sam2Config,
    Sam2ImageProcessor,
    Sam2Model,
    Sam2Processor,
    Sam2VideoConfig,
    Sam2VideoModel,
    SamHQConfig,
    SamHQModel,
    SamHQProcessor,
    SamImageProcessor,
)

from ovref.known_models.random_weights import varied
from ovref_inference import ModelError
from ovref_inference.proposers.config import SamConfig, SamGridConfig
from ovref_inference.proposers.sam import SamMasks
from ovref_inference.proposers.sam_model import load_sam

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, size=(*size_hw, 3), dtype=np.uint8)
          for size_hw in ((64, 64), (48, 80), (130, 40))]  # fmt: skip
BOXES = [
    np.array([[3, 4, 30.5, 40], [0, 0, 64, 64]]),
    np.zeros((0, 4)),
    np.array([[1, 60, 39, 130.0]]),
]
PROMPTS = {"hidden_size": 16, "image_size": 64, "patch_size": 16}
DECODER = {
    "hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
    "num_hidden_layers": 2,
}  # fmt: skip
LEVELS = {
    "fpn_hidden_size": 16, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}  # fmt: skip
HIERA = {
    "model_type": "sam2_hiera_det_model", "image_size": [64, 64], "hidden_size": 8,
    "num_attention_heads": 1, "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 24, 32], "num_attention_heads_per_stage": [1, 2, 2, 2],
    "window_size_per_stage": [4, 4, 2, 2], "global_attention_blocks": [3],
    "window_positional_embedding_background_size": [4, 4],
}  # fmt: skip
SAM2 = {
    "vision_config": {**LEVELS, "backbone_config": HIERA,
                      "backbone_channel_list": [32, 24, 16, 8]},
    "prompt_encoder_config": PROMPTS,
    "mask_decoder_config": DECODER,
}  # fmt: skip


def sam2():
    return Sam2Model(Sam2Config(**SAM2))


def sam2_for_videos():
    memory = {"memory_attention_hidden_size": 16, "memory_attention_feed_forward_hidden_size": 16,
              "memory_encoder_hidden_size": 16, "memory_encoder_output_channels": 8,
              "mask_downsampler_embed_dim": 16, "memory_fuser_embed_dim": 16,
              "memory_fuser_intermediate_dim": 16, "memory_attention_num_layers": 1,
              "memory_attention_rope_feat_sizes": [4, 4], "image_size": 64}  # fmt: skip
    return Sam2VideoModel(Sam2VideoConfig(**SAM2, **memory))


def edgetam():
    backbone = {
        "model_type": "timm_wrapper", "architecture": "repvit_m1", "num_classes": 2,
        "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3],
                       "embed_dim": (8, 16, 24, 32), "depth": (1, 1, 1, 1)},
    }  # fmt: skip
    vision = {**LEVELS, "backbone_config": backbone, "backbone_channel_list": [32, 24, 16, 8]}
    return EdgeTamModel(
        EdgeTamConfig(
            vision_config=vision, prompt_encoder_config=PROMPTS, mask_decoder_config=DECODER
        )
    )


def sam_hq():
    vision = {
        "image_size": 64, "patch_size": 16, "hidden_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "global_attn_indexes": [0, 1], "window_size": 4,
        "output_channels": 16, "num_pos_feats": 8,
    }  # fmt: skip
    return SamHQModel(
        SamHQConfig(
            vision_config=vision,
            prompt_encoder_config=PROMPTS,
            mask_decoder_config={**DECODER, "vit_dim": 24},
        )
    )


FAMILIES = {"sam2": sam2, "sam2 for videos": sam2_for_videos, "sam_hq": sam_hq, "edgetam": edgetam}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            torch.manual_seed(2)
            model = varied(FAMILIES[family]())
            with torch.no_grad():
                for head in model.mask_decoder.output_hypernetworks_mlps:
                    head.proj_out.weight *= 20  # logits far from 0
            folder = tmp_path_factory.mktemp("sam")
            model.save_pretrained(folder)
            made[family] = load_sam(str(folder))
        return made[family]

    return of


def expected(sam, image_hwc, boxes_n4, multimask):
    """(n, masks, H, W) and (n, masks) of the library's processor and model."""
    if sam.config.model_type == "sam_hq":
        square = {"height": 64, "width": 64}
        processor = SamHQProcessor(SamImageProcessor(size={"longest_edge": 64}, pad_size=square))
    else:
        processor = Sam2Processor(Sam2ImageProcessor(size={"height": 64, "width": 64}))
    inputs = processor(images=image_hwc, input_boxes=[boxes_n4.tolist()], return_tensors="pt")
    inputs = inputs.to(torch.float32)
    sizes = {key: inputs.pop(key) for key in ("original_sizes", "reshaped_input_sizes")
             if key in inputs}  # fmt: skip
    with torch.inference_mode():
        found = sam(**inputs, multimask_output=multimask)
    masks = processor.post_process_masks(found.pred_masks, *sizes.values())[0]
    return masks.numpy(), found.iou_scores[0].numpy()


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_boxes_are_those_of_the_library(family, multimask, loaded):
    sam = loaded(family)
    answers = list(SamMasks(sam, batch_size=2).of_boxes(IMAGES, BOXES, multimask=multimask))
    shares = []
    for image, boxes, (masks, ious) in zip(IMAGES, BOXES, answers, strict=True):
        assert masks.shape == (len(boxes), *image.shape[:2]) and masks.dtype == bool
        if not len(boxes):
            continue
        theirs, scores = expected(sam, image, boxes, multimask)
        best = scores.argmax(1)
        resized = image.shape[:2] != (64, 64)
        if resized and not multimask:
            continue  # SAM 2 chooses between masks by their stability, which rounding may turn
        np.testing.assert_allclose(ious, scores.max(1), atol=2e-2 if resized else 1e-4)
        for row, mask in enumerate(masks):
            # The library rounds what it resized to whole numbers.
            assert np.mean(mask != theirs[row, best[row]]) < (0.06 if resized else 0.002)
        shares.append(masks.mean())
    assert min(shares) > 0.001 and max(shares) < 0.999, "the comparison needs masks that split"


@pytest.mark.parametrize("family", ["sam2", "sam_hq"])
def test_masks_of_a_grid_at_the_images_size(family, loaded):
    config = SamGridConfig(
        sam=SamConfig(model="unused"), points_per_side=3, min_predicted_iou=0, min_stability=0
    )
    for image, (masks, ious) in zip(
        IMAGES, SamMasks(loaded(family)).of_grid(IMAGES, config), strict=True
    ):
        assert masks.shape[1:] == image.shape[:2] and (np.diff(ious) <= 0).all()


def test_other_types_are_refused(tmp_path):
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                       intermediate_size=8)).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ModelError, match=r"it is a vit, not a sam.*SAM 2, SAM-HQ or EdgeTAM"):
        load_sam(str(tmp_path))
