"""Models of images and texts of the library transformers: CLIP, MetaCLIP 2, SigLIP, SigLIP2 and
TIPSv2, each with its own tokenizer, length of texts and padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ovref_inference.encoders import vit_towers
from ovref_inference.encoders.config import TextEncoderConfig
from ovref_inference.encoders.towers import pair, unusable
from ovref_inference.models import check_complete, model_errors
from ovref_inference.pixels import Pixels

LOWER_CASE = ("siglip", "siglip2", "tipsv2")
"""Types of models that saw texts in lower case only; the tokenizers of some published folders do
not see to it."""

WITHOUT_MASK = ("siglip", "siglip2")
"""Types that were trained with padding as part of a text: it is not masked."""


@dataclass(frozen=True)
class JointModel:
    """What `TextEncoder` needs of a model, from one of transformers."""

    model: Any
    tokenizer: Any
    visual: Any
    """Has `image_size`: height and width of whole images, in pixels."""

    @property
    def longest(self) -> int:
        """Tokens that a text can have, with those that begin and end it."""
        return int(self.model.config.text_config.max_position_embeddings)

    def tokens(self, texts: Sequence[str]) -> Any:
        """Texts, padded to the whole length as in training; the ends of longer ones are cut off."""
        kind = self.model.config.model_type
        if kind in LOWER_CASE:
            texts = [text.lower() for text in texts]
        return self.tokenizer(
            list(texts), padding="max_length", max_length=self.longest, truncation=True,
            return_attention_mask=kind not in WITHOUT_MASK, return_token_type_ids=False,
            return_tensors="pt",
        )  # fmt: skip

    def encode_text(self, tokens: Any, normalize: bool) -> torch.Tensor:
        """(n, d) of what `tokens` gives."""
        return _scaled(self.model.get_text_features(**tokens), normalize)

    def encode_image(self, pixels: torch.Tensor, normalize: bool) -> torch.Tensor:
        """(n, d) of pixels (n, 3, *image_size)."""
        inputs = {"pixel_values": pixels}
        if self.model.config.model_type == "siglip2":
            inputs = vit_towers.flexible(pixels, self.model.config.vision_config.patch_size)
        return _scaled(self.model.get_image_features(**inputs), normalize)


def settings_of(config: TextEncoderConfig) -> tuple[Any, str, dict[str, Any]]:
    """As `vit_towers.settings_of`. Raises ModelError for a type that cannot be used, too."""
    found = vit_towers.settings_of(config.model, config.revision)
    kind = found[0].model_type
    if kind not in vit_towers.TEXT_MODELS:
        raise unusable(
            config.model, f"type {kind!r}", "it has no text tower that is known here",
            f"expected a model of type {', '.join(vit_towers.TEXT_MODELS)}, or one of library "
            "open_clip",
        )  # fmt: skip
    return found


def open_joint(config: TextEncoderConfig, device: torch.device) -> tuple[JointModel, Pixels]:
    """The model that `config` names, on its device, and the preprocessing of its images.

    Raises:
        ModelError: it cannot be found or read, or is of another type.
    """
    settings, path, options = settings_of(config)
    advice = "; its folder must hold the tokenizer's files"
    with model_errors(f"load {config.model} with its tokenizer", advice):
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        processor = AutoImageProcessor.from_pretrained(path, **options).to_dict()
        model, report = AutoModel.from_pretrained(
            path, config=settings, dtype=torch.float32, output_loading_info=True, **options
        )
    check_complete(config.model, report)
    with model_errors(f"use {config.model}"):
        images = Pixels.of_transformers(processor, device, torch.float32)
        visual = SimpleNamespace(image_size=_image_size(settings.vision_config))
        return JointModel(model.eval().to(device), tokenizer, visual), images


def _image_size(vision: Any) -> tuple[int, int]:
    """Height and width of the images that a vision tower was made for."""
    size = getattr(vision, "image_size", None)
    if size is None:  # SigLIP2 of any aspect ratio says how many patches
        size = int(vision.num_patches**0.5) * vision.patch_size
    height, width = pair(size)
    return int(height), int(width)


def _scaled(output: Any, normalize: bool) -> torch.Tensor:
    found = output if isinstance(output, torch.Tensor) else output.pooler_output
    return torch.nn.functional.normalize(found, dim=-1) if normalize else found
