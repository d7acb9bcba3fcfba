"""CLIP's byte-pair vocabulary, cut to its most frequent merges.

Every string can still be encoded (all bytes are in it); rare words just take several tokens. The
merges come from the file that open_clip ships (MIT licence, from OpenAI's CLIP).
"""

import gzip
import json
from pathlib import Path

import open_clip
from transformers import CLIPTokenizer

VOCABULARY = 4096
CONTEXT = 77
BEGIN, END = VOCABULARY - 2, VOCABULARY - 1


def vocabulary_and_merges():
    """({token: id} with VOCABULARY entries, list of merges as "left right")."""
    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    symbols = list(open_clip.tokenizer.bytes_to_unicode().values())
    symbols += [symbol + "</w>" for symbol in symbols]
    merges = lines[1 : 1 + VOCABULARY - 2 - len(symbols)]
    tokens = [*symbols, *("".join(m.split()) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def save_tokenizer(folder, pad):
    """Writes the files of a `transformers.CLIPTokenizer` into `folder` and returns it loaded."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = vocabulary_and_merges()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
               "unk_token": "<|endoftext|>", "pad_token": pad}  # fmt: skip
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT,
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)
