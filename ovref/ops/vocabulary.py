"""The vocabulary of a corpus: how often each noun occurs."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ovref.contract import Dropped
from ovref.records import Prompt

COVERAGE_SIZES = (100, 1000, 10_000)
SCARCE_BELOW = (2, 5, 20)


def vocabulary_report(
    prompts: Iterable[Prompt | Dropped], *, classes: Sequence[str] = (), listed: int = 50
) -> dict[str, Any]:
    """Noun statistics of a corpus, as plain JSON values.

    Args:
        prompts: output of `extract_nouns`, including drops; read once.
        classes: class names (lower-case, singular) to count.
        listed: number of the most, and of the least, frequent nouns to list.

    Returns:
        `captions` (with nouns), `dropped` (by reason), `nouns` (distinct), `mentions` (captions
        summed over nouns), `compounds` (distinct nouns of several words), `nouns_per_caption`
        (number of captions by number of nouns), `coverage` (share of mentions covered by the most
        frequent 100, 1000, 10000 nouns), `scarce` (distinct nouns with fewer mentions than 2, 5,
        20), `top` and `rare` ([noun, mentions] pairs), `classes` (mentions by class name).
    """
    counts: Counter[str] = Counter()
    per_caption: Counter[int] = Counter()
    dropped: Counter[str] = Counter()
    for prompt in prompts:
        if isinstance(prompt, Dropped):
            dropped[prompt.reason] += 1
            continue
        per_caption[len(prompt.nouns)] += 1
        counts.update({noun.text for noun in prompt.nouns})
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    mentions = counts.total()
    return {
        "captions": per_caption.total(),
        "dropped": dict(sorted(dropped.items())),
        "nouns": len(counts),
        "compounds": sum(" " in noun for noun in counts),
        "mentions": mentions,
        "nouns_per_caption": {str(number): per_caption[number] for number in sorted(per_caption)},
        "coverage": {
            str(size): round(sum(count for _, count in ranked[:size]) / mentions, 4)
            for size in COVERAGE_SIZES
            if mentions
        },
        "scarce": {
            str(below): sum(count < below for count in counts.values()) for below in SCARCE_BELOW
        },
        "top": [list(item) for item in ranked[:listed]],
        "rare": [
            list(item) for item in sorted(ranked, key=lambda item: (item[1], item[0]))[:listed]
        ],
        "classes": {name: counts[name] for name in classes},
    }
