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
    "facebook/dino-vit*": "Apache-2.0",
    "facebook/dinov2-*": "Apache-2.0",
    "facebook/dinov3-*": "DINOv3 License",
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
