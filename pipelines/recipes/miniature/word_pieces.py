"""The miniature GroundingDINO's words: a small BERT vocabulary and its tokenizer's folder.

GroundingDINO finds the ends of phrases by BERT's own ids of `[CLS]`, `[SEP]`, `.` and `?`, so these
keep them: ids up to 1061 are laid out as in bert-base-uncased. The nouns of the miniature world
follow as whole words; any other word is spelled in letters.
"""

from pathlib import Path

from transformers import BertTokenizer

from ovref.miniature.captions import plural
from ovref.miniature.shapes import CLASSES

BEGIN, END, STOP = 101, 102, 1012
"""Ids of `[CLS]`, `[SEP]` and `.`."""
LONGEST = 256
"""Maximum number of tokens in a prompt."""


def vocabulary():
    """{token: id}; special tokens at BERT's ids, characters, pieces of words, words."""
    tokens = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens += [f"[unused{i}]" for i in range(99, 994)]
    # BERT lists printable ASCII from "!" on, in order and without capitals.
    characters = [chr(code) for code in range(ord("!"), 127) if not chr(code).isupper()]
    tokens += characters
    tokens += [f"##{c}" for c in characters if c.isalnum()]
    words = {word for c in CLASSES for form in (c, plural(c)) for word in form.split()}
    return {token: i for i, token in enumerate([*tokens, *sorted(words)])}


def save_tokenizer(folder):
    """Writes the files of a `transformers.BertTokenizer` into `folder` and returns it."""
    tokenizer = BertTokenizer(vocab=vocabulary(), do_lower_case=True, model_max_length=LONGEST)
    tokenizer.save_pretrained(Path(folder))
    return tokenizer
