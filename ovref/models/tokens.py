"""Where the nouns of a caption stand: every mention, and in a text encoder's own tokenization."""

import re
from collections.abc import Sequence
from typing import Any

from ovref.errors import ModelError
from ovref.records import Noun


def mentions(caption: str, nouns: Sequence[Noun]) -> dict[str, list[tuple[int, int]]]:
    """All the places where each noun is said; DAAM averages a word over its occurrences.

    A noun is said at its own spans and wherever the caption has the same words again, in either
    case, as whole words and not as a part of another noun (`wall` is not said in `brick wall` when
    that is a noun of its own).

    Returns:
        Noun text -> ascending spans [start, end), in the order of `nouns`.
    """
    own = {(noun.start, noun.end) for noun in nouns}
    found: dict[str, set[tuple[int, int]]] = {}
    for noun in nouns:
        spans = found.setdefault(noun.text, set())
        spans.add((noun.start, noun.end))
        words = re.escape(caption[noun.start : noun.end])
        for match in re.finditer(rf"(?<!\w){words}(?!\w)", caption, re.IGNORECASE):
            if not any(match.start() < end and match.end() > start for start, end in own):
                spans.add(match.span())
    return {text: sorted(spans) for text, spans in found.items()}


def token_positions(
    tokenizer: Any, caption: str, spans: Sequence[Sequence[tuple[int, int]]]
) -> list[tuple[int, ...]]:
    """Positions of each noun's tokens along the text encoder's key axis.

    The tokenizer is called exactly as the diffusers pipelines call it (truncated to its
    `model_max_length`, special tokens added), and its character offsets refer to the caption as it
    was given, so lower-casing, Unicode composition and white-space clean-up inside the tokenizer do
    not move anything. A token belongs to a span when the two share a character.

    The two tokenizers of SDXL cut text alike (they differ in padding), so one call serves both.

    Args:
        tokenizer: a fast transformers tokenizer, such as a pipeline's `tokenizer`.
        caption: the prompt as it goes to the pipeline.
        spans: for each noun, the character spans [start, end) of its occurrences.

    Returns:
        For each noun the ascending positions of the tokens of all its occurrences that lie wholly
        within the context, counted from the start-of-text token at 0. Empty when no occurrence
        does: the noun has no heatmap.

    Raises:
        ModelError: the tokenizer cannot tell character offsets.
        ValueError: a span is empty or lies outside the caption.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer is needed, "
            "whose folder holds tokenizer.json or vocab.json with merges.txt"
        )
    encoded = tokenizer(
        caption,
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    # The first row is what the text encoder sees, the others are what was cut off.
    rows = [
        [
            (position, start, end)
            for position, ((start, end), special) in enumerate(zip(offsets, specials, strict=True))
            if not special
        ]
        for offsets, specials in zip(
            encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
        )
    ]
    kept, cut_off = rows[0], [token for row in rows[1:] for token in row]

    found = []
    for noun_spans in spans:
        positions: set[int] = set()
        for start, end in noun_spans:
            if not 0 <= start < end <= len(caption):
                raise ValueError(f"span [{start}, {end}) is not in a caption of {len(caption)}")
            if not _within(cut_off, start, end):
                positions.update(_within(kept, start, end))
        found.append(tuple(sorted(positions)))
    return found


def _within(tokens: list[tuple[int, int, int]], start: int, end: int) -> list[int]:
    """Positions of the (position, first, last) tokens that share a character with [start, end)."""
    return [position for position, first, last in tokens if first < end and last > start]
