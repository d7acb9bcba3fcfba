"""The licences of known models, for the manifests of collections."""

from fnmatch import fnmatchcase
from pathlib import PurePosixPath

UNKNOWN = "unknown"

MODELS = {
    "miniature:tagger": "Apache-2.0, trained on a treebank under CC BY-SA 4.0",
    "miniature:*": "Apache-2.0",
    "*/stable-diffusion-2-1*": "CreativeML Open RAIL++-M",
    "*/stable-diffusion-2-base": "CreativeML Open RAIL++-M",
    "*/stable-diffusion-xl-base-1.0": "CreativeML Open RAIL++-M",
    "*/stable-diffusion-v1-5": "CreativeML OpenRAIL-M",
    "CompVis/stable-diffusion-v1-4": "CreativeML OpenRAIL-M",
    "stabilityai/stable-diffusion-3*": "Stability AI Community License",
    "black-forest-labs/FLUX.1-schnell": "Apache-2.0",
    "black-forest-labs/FLUX.1-dev": "FLUX.1 [dev] Non-Commercial License",
    "black-forest-labs/FLUX.2-klein-*4B": "Apache-2.0",
    "Tongyi-MAI/Z-Image-Turbo": "Apache-2.0",
    "Qwen/Qwen-Image": "Apache-2.0",
    "Efficient-Large-Model/Sana_Sprint_*": "NVIDIA Source Code License (NSCL) v2-custom",
    "facebook/dino-vit*": "Apache-2.0",
    "facebook/dinov2-*": "Apache-2.0",
    "facebook/dinov3-*": "DINOv3 License",
    "timm/*dinov3*": "DINOv3 License",
    "google/tipsv2-*": "Apache-2.0",
    "google/siglip*": "Apache-2.0",
    "*-SigLIP*:webli": "Apache-2.0",
    "nvidia/C-RADIO*": "NVIDIA Open Model License",
    "timm/*radio_v*.c_radio": "NVIDIA Open Model License",
    "facebook/vit-mae-*": "Apache-2.0",
    "timm/*.mae": "CC BY-NC 4.0",
    "facebook/ijepa_*": "CC BY-NC 4.0",
    "timm/*_ijepa": "CC BY-NC 4.0",
    "timm/vit_pe_*": "Apache-2.0",
    "PE-Core-*:meta": "Apache-2.0",
    "EVA02-*": "MIT",
    "MobileCLIP2-*": "Apple Machine Learning Research Model License",
    "facebook/sam2*": "Apache-2.0",
    "google/owlv2-*": "Apache-2.0",
    "facebook/sam-vit-*": "Apache-2.0",
    "facebook/maskformer-*": "CC BY-NC 4.0",
    "sam_vit_[bhl]_*.pth": "Apache-2.0",
    "IDEA-Research/grounding-dino-*": "Apache-2.0",
    "openai/clip-*": "MIT",
    "*:openai": "MIT",
    "*:laion*": "MIT",
    "hf-hub:laion/CLIP-*": "MIT",
    "en_core_web_*": "MIT",
}
"""Pattern of a model id, or of the file name of an original checkpoint -> licence; the first match
counts."""


def licence_of(model: str) -> str:
    """The licence of a model as stated by its publisher; `unknown` if it is not listed."""
    names = (model, PurePosixPath(model).name if model.endswith(".pth") else model)
    for pattern, licence in MODELS.items():
        if any(fnmatchcase(name, pattern) for name in names):
            return licence
    return UNKNOWN
