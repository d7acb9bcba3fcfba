"""Random weights of a known model's architecture, in the layout of its library."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from safetensors.torch import save_file

from ovref.identity import fingerprint
from ovref.known_models.table import KnownModel

WORDS = "a an of the photo picture image with and on red blue green tree house boat sky grass sea"
"""Words of the tokenizers that come with random weights; the letters are there, too."""


def write(known: KnownModel, folder: Path, *, tiny: bool = False, seed: int = 0) -> Path:
    """Writes a model to a folder that is made if it is missing.

    Args:
        known: which.
        tiny: with the sizes for tests.
        seed: of the weights.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    libraries = {"transformers": _transformers, "open_clip": _open_clip, "timm": _timm}
    libraries[known.library](known, folder, tiny)
    return folder


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The first with what the second has, mappings inside merged in the same way."""
    found = dict(first)
    for key, value in second.items():
        inner = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if inner else value
    return found


def varied(model: torch.nn.Module) -> torch.nn.Module:
    """The same model, with weights in which every part of it is seen in its features.

    Registers, positions, biases and scales that begin as zeros or ones are moved apart; matrices
    and kernels get the spread at which the size of activations stays about the same.
    """
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.is_floating_point() or weight.numel() < 2:
                continue
            if weight.std() < 1e-4:
                weight.add_(0.1 * torch.randn_like(weight))
            elif weight.ndim in (2, 4):
                weight.mul_((weight[0].numel() ** -0.5) / weight.std())
    return model.eval()


def settings_of(known: KnownModel, tiny: bool = False) -> Any:
    """The configuration of a model of transformers."""
    kind = getattr(transformers, known.network).config_class
    return kind(**(merged(known.config, known.tiny) if tiny else dict(known.config)))


def _transformers(known: KnownModel, folder: Path, tiny: bool) -> None:
    model: Any = getattr(transformers, known.network)(settings_of(known, tiny))
    varied(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(known.processor)))
    if "text" in known.roles:
        write_tokenizer(folder, model.config.text_config)


def _timm(known: KnownModel, folder: Path, tiny: bool) -> None:
    settings = merged(known.config, known.tiny) if tiny else dict(known.config)
    model = timm.create_model(known.network, num_classes=0, **settings)
    # A private name, but the one that writes the layout of timm's repositories.
    from timm.models._hub import save_for_hf

    save_for_hf(varied(model), str(folder), model_args=settings, safe_serialization=True)


def _open_clip(known: KnownModel, folder: Path, tiny: bool) -> None:
    import open_clip

    found = open_clip.get_model_config(known.network)
    settings = merged(found, known.tiny) if tiny else found
    if tiny and known.tiny_trunk:
        trunk = settings["vision_cfg"]["timm_model_name"]
        settings["vision_cfg"]["timm_model_name"] = _registered(trunk, known.tiny_trunk)
    model = varied(open_clip_model(settings))
    settings["custom_text"] = isinstance(model, open_clip.CustomTextCLIP)
    architecture, _, tag = known.model.partition(":")
    published = open_clip.get_pretrained_cfg(architecture, tag)
    settings["quick_gelu"] = bool(published.get("quick_gelu", False))
    preprocess = {key: published[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": settings, "preprocess_cfg": preprocess})
    )
    weights = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    if "hf_tokenizer_name" in settings["text_cfg"]:
        write_tokenizer(folder, None)


def open_clip_model(settings: Mapping[str, Any]) -> Any:
    """The model of an open_clip configuration, its weights as they are initialised."""
    import open_clip

    kind = open_clip.CustomTextCLIP if settings.get("custom_text") else open_clip.CLIP
    return kind(**{key: value for key, value in settings.items() if key != "custom_text"})


def _registered(network: str, arguments: Mapping[str, Any]) -> str:
    """The name under which timm knows, in this process, a network with other arguments: open_clip
    can only name one."""

    def make(pretrained: bool = False, **options: Any) -> torch.nn.Module:
        given = {key: value for key, value in options.items() if value is not None}
        return timm.create_model(network, **{**given, **arguments})

    make.__name__ = f"tiny_{network}_{fingerprint(dict(arguments))[:8]}"
    if not timm.is_model(make.__name__):
        timm.models.register_model(make)
    return make.__name__


def write_tokenizer(folder: Path, text: Any) -> None:
    """A tokenizer of a few words and letters, with the special tokens that a text tower expects.

    Args:
        text: configuration of the text tower, or None.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["<pad>", "<eos>", "<bos>", "<unk>"]
    if getattr(text, "eos_token_id", None) == 2:  # CLIP's pool looks for this id
        names[1], names[2] = names[2], names[1]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = {word: number for number, word in enumerate(
        dict.fromkeys([*names, *WORDS.split(), *letters]))}  # fmt: skip
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", vocabulary["<eos>"])]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>",
    ).save_pretrained(folder)  # fmt: skip
