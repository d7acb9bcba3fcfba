"""Locates the nouns of a caption: all mentions, and their tokens in a text encoder."""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from ovref.errors import ModelError
from ovref.records import Noun

PLACEHOLDER = "\ue000caption\ue001"
"""Stands for a caption while a chat template is examined: characters that no template has."""


def mentions(caption: str, nouns: Sequence[Noun]) -> dict[str, list[tuple[int, int]]]:
    """All mentions of each noun; DAAM averages a word over its occurrences.

    A noun is mentioned at its own spans and wherever the caption repeats its words, ignoring case,
    as whole words that are not part of another noun (if `brick wall` is a noun, it does not mention
    `wall`).

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
    tokenizer: Any,
    caption: str,
    spans: Sequence[Sequence[tuple[int, int]]],
    *,
    max_length: int | None = None,
    before: str = "",
    after: str = "",
    **options: Any,
) -> list[tuple[int, ...]]:
    """Positions of each noun's tokens among the tokens of a text encoder.

    The tokenizer is called exactly as by diffusers' pipelines (truncated to its
    `model_max_length`, special tokens added). Its character offsets refer to the original
    caption, whatever lower-casing, Unicode composition and white-space clean-up the tokenizer
    applies. A token belongs to a span if they share a character.

    The two tokenizers of SDXL split text alike (they differ in padding), so one call serves both.

    Args:
        tokenizer: a fast transformers tokenizer, such as a pipeline's `tokenizer`.
        caption: the prompt as passed to the pipeline.
        spans: for each noun, the character spans [start, end) of its occurrences.
        max_length: tokens that the text encoder sees; None for the tokenizer's own maximum.
        before: what a prompt template puts before the caption.
        after: what it puts after it.
        options: of the tokenizer's call, such as `padding="max_length"`, which on the left moves
            all positions.

    Returns:
        For each noun, the ascending token positions of all its occurrences that lie entirely within
        the context, counted from the first token (of CLIP, the start of the text) at 0. Empty if no
        occurrence does; the noun then has no heatmap.

    Raises:
        ModelError: the tokenizer does not provide character offsets.
        ValueError: a span is empty or lies outside the caption.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} has no character offsets: a fast tokenizer is needed, "
            "whose folder holds tokenizer.json or vocab.json with merges.txt"
        )
    encoded = tokenizer(
        before + caption + after,
        truncation=True,
        max_length=tokenizer.model_max_length if max_length is None else max_length,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        **options,
    )
    # The first row is the text encoder's input, the others were cut off.
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
            first, last = start + len(before), end + len(before)
            if not _within(cut_off, first, last):
                positions.update(_within(kept, first, last))
        found.append(tuple(sorted(positions)))
    return found


def around_caption(render: Callable[[str], str]) -> tuple[str, str]:
    """What a chat template puts before and after a caption.

    Args:
        render: the caption to the text that is tokenized.

    Raises:
        ModelError: the template does not contain the caption exactly once as it is given.
    """
    before, _, after = (text := render(PLACEHOLDER)).partition(PLACEHOLDER)
    if text != before + PLACEHOLDER + after or PLACEHOLDER in after:
        raise ModelError(
            "the chat template of the text encoder changes or repeats the caption, so positions of "
            f"nouns cannot be found in it; it makes {text[:200]!r} of {PLACEHOLDER!r}"
        )
    return before, after


def lowered(
    caption: str, spans: Sequence[Sequence[tuple[int, int]]]
) -> tuple[str, list[list[tuple[int, int]]]]:
    """`caption.lower().strip()`, as PixArt and Sana take it, and the spans in that text."""
    # Lower-casing may lengthen a character; it never shortens one.
    starts = [0, *accumulate(len(character.lower()) for character in caption)]
    text = caption.lower()
    cut = len(text) - len(text.lstrip())
    text = text.strip()
    moved = [
        [
            (max(0, starts[start] - cut), min(len(text), starts[end] - cut))
            for start, end in noun_spans
        ]
        for noun_spans in spans
    ]
    return text, moved


def _within(tokens: list[tuple[int, int, int]], start: int, end: int) -> list[int]:
    """Positions of the (position, first, last) tokens that share a character with [start, end)."""
    return [position for position, first, last in tokens if first < end and last > start]
