"""The text tower of a CLIP model in numpy, which embeds a query faster than torch is imported.

For local folders of open_clip's layout (config, safetensors, `vocab.json` and `merges.txt`) with
its own text transformer. Builds and segmenters use `load.TextEncoder`; the two agree up to
rounding.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ovref_inference.encoders.config import TextEncoderConfig
from ovref_inference.models import resolve
from ovref_inference.vectors import l2_normalised

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_KNOWN = {"context_length", "vocab_size", "hf_tokenizer_name", "width", "heads", "layers"}
"""Supported settings of a text tower; a tower with others is left to open_clip."""
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
"""Pattern of a word in CLIP's tokenizer."""


class TextTower:
    """A CLIP's text transformer. Made by `load_without_torch`."""

    def __init__(self, weights: dict[str, np.ndarray], tokenizer: Any, settings: Any) -> None:
        self._weights, self._tokenizer = weights, tokenizer
        self._heads, self._layers = settings["heads"], settings["layers"]
        self._length = settings["context_length"]
        self._quick = settings["quick_gelu"]

    def encode(self, texts: list[str]) -> np.ndarray:
        """(n, dim) float32, L2-normalised. A text longer than the context is truncated."""
        rows = [self._tokenizer.encode(text.strip()).ids for text in texts]
        rows = [[*row[: self._length - 1], row[-1]] if len(row) > self._length else row
                for row in rows]  # fmt: skip
        lengths = np.array([len(row) for row in rows])
        tokens = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)] = ids
        # Attention is causal: tokens after the end change nothing, so texts are not padded to the
        # whole context.
        x = self._weights["token_embedding.weight"][tokens]
        x = x + self._weights["positional_embedding"][: tokens.shape[1]]
        for number in range(self._layers):
            x = self._block(x, f"transformer.resblocks.{number}.")
        x = self._norm(x[np.arange(len(rows)), lengths - 1], "ln_final")
        return l2_normalised(x @ self._weights["text_projection"])

    def _block(self, x: np.ndarray, name: str) -> np.ndarray:
        n, length, width = x.shape
        inside = self._linear(self._norm(x, f"{name}ln_1"), f"{name}attn.in_proj_")
        heads = inside.reshape(n, length, 3, self._heads, -1).transpose(2, 0, 3, 1, 4)
        queries, keys, values = heads
        scores = queries @ keys.swapaxes(2, 3) / np.float32(np.sqrt(width // self._heads))
        scores += np.triu(np.full((length, length), -np.inf, dtype=np.float32), 1)
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (powers / powers.sum(-1, keepdims=True)) @ values
        mixed = mixed.transpose(0, 2, 1, 3).reshape(n, length, width)
        x = x + self._linear(mixed, f"{name}attn.out_proj.")
        hidden = self._linear(self._norm(x, f"{name}ln_2"), f"{name}mlp.c_fc.")
        return x + self._linear(self._gelu(hidden), f"{name}mlp.c_proj.")

    def _gelu(self, x: np.ndarray) -> np.ndarray:
        if self._quick:
            return x / (1 + np.exp(-1.702 * x))
        return (0.5 * x * (1 + _erf(x / np.sqrt(2)))).astype(np.float32)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scale = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred * scale * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        weight, bias = self._weights[f"{name}weight"], self._weights[f"{name}bias"]
        return x @ weight.T + bias


def _special_tokens(folder: Path) -> list[str]:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = [settings.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")]
    texts = [each.get("content") if isinstance(each, dict) else each for each in found]
    return [text for text in dict.fromkeys(texts) if text]


def _erf(x: np.ndarray) -> np.ndarray:
    """The error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26)."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    series = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    return np.sign(x) * (1 - series * np.exp(-x * x))


def load_without_torch(config: TextEncoderConfig) -> TextTower | None:
    """The text tower of a model, or None if this module does not support it.

    Raises:
        ModelError: as in `models.resolve`.
    """
    folder = Path(resolve(config.model))
    files = [folder / name for name in (CONFIG, WEIGHTS, "vocab.json", "merges.txt")]
    if not all(path.is_file() for path in files):
        return None
    model = json.loads(files[0].read_text(encoding="utf-8")).get("model_cfg", {})
    settings = dict(model.get("text_cfg", {}))
    if not settings.keys() <= _KNOWN or not {"heads", "layers"} <= settings.keys():
        return None
    try:
        from safetensors import safe_open
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    except ModuleNotFoundError:
        return None  # loading with open_clip then says what is missing
    with safe_open(str(files[1]), framework="numpy") as file:
        names = [name for name in file.keys() if not name.startswith("visual.")]  # noqa: SIM118
        weights = {name: file.get_tensor(name).astype(np.float32) for name in names}
    if "text_projection" not in weights or "token_embedding.weight" not in weights:
        return None
    tokenizer = Tokenizer(
        models.BPE.from_file(
            str(files[2]), str(files[3]), continuing_subword_prefix="",
            end_of_word_suffix="</w>", unk_token="<|endoftext|>",
        )
    )  # fmt: skip
    # Found before anything else, as in transformers; CLIP's padding is an exclamation mark.
    tokenizer.add_special_tokens(_special_tokens(folder))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    start, end = (tokenizer.token_to_id(name) for name in (_START, _END))
    if start is None or end is None:
        return None
    tokenizer.post_processor = processors.RobertaProcessing(
        (_END, end), (_START, start), trim_offsets=False, add_prefix_space=False
    )
    settings = {"context_length": 77} | settings | {"quick_gelu": bool(model.get("quick_gelu"))}
    return TextTower(weights, tokenizer, settings)
