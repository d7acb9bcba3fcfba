"""Networks of their full size with random weights, and an image for each of them, so that a real
step of a paper's configuration can be made."""

import json

import numpy as np
import open_clip
from PIL import Image
from safetensors.torch import save_file
from transformers import SwinConfig, SwinModel

from ovref.evaluation.named_sets.bundled_classes import bundled
from ovref.evaluation.named_sets.sets_coco import STUFF_IDS

SIZE_HW = (480, 640)
"""The commonest size of COCO's photographs."""
SMALL_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
SMALL_VISION = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}


def write_clip(folder, dim, vision):
    """A CLIP of random weights with a small text tower, in open_clip's layout."""
    folder.mkdir(parents=True)
    settings = {"embed_dim": dim, "vision_cfg": vision, "text_cfg": SMALL_TEXT}
    model = open_clip.CLIP(**settings)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    described = {"model_cfg": settings, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return str(folder)


def write_convnext_large(folder):
    """FC-CLIP's CLIP."""
    settings = open_clip.get_model_config("convnext_large_d_320")
    vision = settings["vision_cfg"] | {"timm_model_pretrained": False}
    return write_clip(folder, settings["embed_dim"], vision)


def write_swin_base(folder):
    """The Swin that OVSeg's MaskFormer begins with."""
    settings = SwinConfig(
        image_size=384, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32],
        window_size=12,
    )  # fmt: skip
    SwinModel(settings, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def write_coco(root, segments=24):
    """A training image of COCO with panoptic segments of many classes, and with COCO-Stuff's
    labels."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, segments, (8, 10)).repeat(60, 0).repeat(64, 1)
    assert blocks.shape == SIZE_HW
    photo = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    known = bundled("coco_panoptic", "panopticapi")
    coded = np.zeros((*SIZE_HW, 3), np.uint8)
    coded[..., 0] = blocks + 1
    info = [{"id": n + 1, "category_id": known["ids"][5 * n], "iscrowd": 0, "area": 1,
             "bbox": [0, 0, 1, 1]} for n in range(segments)]  # fmt: skip
    content = {
        "images": [{"id": 9, "file_name": "000000000009.jpg"}],
        "annotations": [
            {"image_id": 9, "file_name": "000000000009.png", "segments_info": info}
        ],
        "categories": [
            {"id": number, "name": name, "isthing": int(name in known["things"])}
            for number, (name,) in zip(known["ids"], known["classes"], strict=True)
        ],
    }
    for path, pixels in (
        ("train2017/000000000009.jpg", photo),
        ("annotations/panoptic_train2017/000000000009.png", coded),
        ("stuffthingmaps/train2017/000000000009.png", np.array(STUFF_IDS, np.uint8)[7 * blocks]),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / path)
    (root / "annotations/panoptic_train2017.json").write_text(json.dumps(content))
    return str(root)
