"""Dense features and embeddings as a model's own library computes them.

An independent path to what `ovref_inference.encoders` computes: the library's automatic class and
its own preprocessing, images of the exact size, and patches as the last tokens of what the model
gives. `ovref check` and the tests compare the two.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ovref_inference.encoders.config import TextEncoderConfig, VisualEncoderConfig
from ovref_inference.models import resolve


@torch.inference_mode()
def dense(config: VisualEncoderConfig, image_hwc: np.ndarray, cell: int) -> np.ndarray:
    """(h, w, d) float32: features `tokens` of the last layer, of an image whose sides are multiples
    of the cell.

    Args:
        config: which model; its `size_hw` is not read.
        image_hwc: (H, W, 3) uint8.
        cell: pixels per side of a cell.

    Raises:
        ValueError: other features, or another layer, which the libraries do not give.
        NotImplementedError: the library gives no dense features of such a network.
    """
    if config.features != "tokens" or config.layer != -1:
        raise ValueError("a library's own features are the tokens of its last layer")
    size_hw = image_hwc.shape[:2]
    cells = (size_hw[0] // cell) * (size_hw[1] // cell)
    folder = Path(resolve(config.model))
    if config.library == "open_clip":
        tokens = _open_clip(folder, image_hwc)
    elif config.library == "timm" or _is_timm(folder):
        tokens = _timm(folder, image_hwc)
    else:
        tokens = _transformers(folder, image_hwc, cells)
    grid = tokens[0, -cells:].float().numpy()
    return grid.reshape(size_hw[0] // cell, size_hw[1] // cell, -1)


@torch.inference_mode()
def embeddings(config: TextEncoderConfig, texts: Sequence[str]) -> np.ndarray:
    """(n, d) float32, L2-normalised: texts through the library's own processor and model."""
    folder = resolve(config.model)
    if config.library == "open_clip":
        import open_clip

        model = open_clip.create_model(f"local-dir:{folder}").eval()
        found = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(list(texts)))
    else:
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        length = model.config.text_config.max_position_embeddings
        kind = model.config.model_type
        if kind.startswith("siglip") or kind == "tipsv2":
            texts = [text.lower() for text in texts]
        inputs = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True,
                           return_tensors="pt")  # fmt: skip
        masked = not kind.startswith("siglip")
        found = model.get_text_features(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask if masked else None
        ).pooler_output
    return torch.nn.functional.normalize(found, dim=-1).numpy()


def _is_timm(folder: Path) -> bool:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder).model_type == "timm_wrapper"


def _transformers(folder: Path, image_hwc: np.ndarray, cells: int) -> torch.Tensor:
    """(1, tokens, d), patches last."""
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    vision = getattr(model, "vision_model", model)
    kind = vision.config.model_type
    options: dict[str, Any] = {"do_resize": False, "do_center_crop": False}
    if kind == "siglip2_vision_model":
        options = {"do_resize": False, "max_num_patches": cells}
    processor = AutoImageProcessor.from_pretrained(folder)
    inputs = processor(images=Image.fromarray(image_hwc), return_tensors="pt", **options)
    if kind == "radio":
        return model(**inputs).features
    if kind in ("clip_vision_model", "metaclip_2_vision_model"):
        found = vision(**inputs, interpolate_pos_encoding=True).last_hidden_state
        return vision.post_layernorm(found)
    if kind == "vit_mae":
        model.config.mask_ratio = 0.0
        inputs["noise"] = torch.linspace(0, 1, cells)[None]
    if kind in ("vit", "vit_mae", "deit", "ijepa", "siglip_vision_model"):
        inputs["interpolate_pos_encoding"] = True
    return vision(**inputs).last_hidden_state


def _timm(folder: Path, image_hwc: np.ndarray) -> torch.Tensor:
    """(1, tokens, d), patches last; the network is made for the size of the image."""
    import timm

    size_hw = image_hwc.shape[:2]
    try:
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=size_hw)
    except TypeError:  # networks without positions have no such argument
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    settings = timm.data.resolve_model_data_config(model)
    return _flat(model.eval().forward_features(_normalised(image_hwc, settings)))


def _open_clip(folder: Path, image_hwc: np.ndarray) -> torch.Tensor:
    """(1, cells, d) in the joint space."""
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}", force_image_size=image_hwc.shape[:2])
    visual = model.eval().visual
    pixels = _normalised(image_hwc, visual.preprocess_cfg)
    if hasattr(visual, "attnpool"):
        raise NotImplementedError("open_clip gives no dense features of a ResNet")
    if not hasattr(visual, "trunk"):
        visual.output_tokens = True
        return visual(pixels)[1] @ visual.proj
    trunk: Any = visual.trunk
    if not hasattr(trunk, "blocks"):
        cells = _flat(trunk.forward_features(pixels))[0]
        return visual.head(trunk.forward_head(cells[:, :, None, None]))[None]
    trunk.set_input_size(img_size=image_hwc.shape[:2])
    cells = trunk.forward_features(pixels)[0, trunk.num_prefix_tokens :]
    pool: Callable[[torch.Tensor], torch.Tensor] | None = trunk.attn_pool
    rows = [trunk.fc_norm(cell[None] if pool is None else pool(cell[None, None])) for cell in cells]
    return visual.head(trunk.head(torch.cat(rows)))[None]


def _flat(found: torch.Tensor) -> torch.Tensor:
    """Tokens as they are, a feature map as its cells."""
    return found if found.ndim == 3 else found.flatten(2).transpose(1, 2)


def _normalised(image_hwc: np.ndarray, settings: Any) -> torch.Tensor:
    pixels = (image_hwc / 255.0 - np.array(settings["mean"])) / np.array(settings["std"])
    return torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)
