"""Proper names of things in a tagged caption: `eiffel tower`, `ha long bay`, `porsche 356`.

1. A name is a sequence of words that are tagged as proper nouns, or are capitalised inside the
   caption and either next to a proper noun or absent from the lexicon. Small words (`Statue of
   Liberty`), a number after a name (`Boeing 747`) and a landmark in lower case (`Eiffel tower`)
   belong to it.
2. Right before a common noun, a name describes it and is no noun itself: `a Volkswagen van`.
3. Names of the whole scene, of an author or on a sign have no region: after `in`, `from` or `by`
   (`in Tokyo`), unless they have a landmark in them (`in Central Park`), in `the style of`, in
   addresses, after `says` and the like; nor do dates.
"""

import re

from ovref.ops.singular import in_lexicon, singular
from ovref.ops.word_lists import ADDRESSES, COLOURS, DATES, LANDMARKS, NAME_LINKS, SPELLS
from ovref.ops.words import NOUN_TAGS, PROPER_TAGS, Word

LONGEST_NAME = 6
"""Maximum number of words in a name."""
DEMONYMS = ("ish", "ese", "ian", "can", "man")
"""Endings of words that describe a landmark: `Victorian house`."""
OF_SCENES = (["style", "of"], ["manner", "of"], ["city", "of"], ["corner", "of"], ["sign", "for"])
"""Words before the name of an author, of the whole scene, or of the text on a sign."""

_NUMBERED = re.compile(r"[a-z]+-?\d+[a-z]*")
"""Words of letters and digits that are names: `f-16`."""
_NAME = re.compile(r"[^\W_][\w.'&-]*")


def name_sizes(words: list[Word]) -> dict[int, tuple[int, str | None]]:
    """Finds names.

    Returns:
        Index of each name's first word -> number of its words, and the name in lower case, or None
        if it is not a noun (rules 2 and 3).
    """
    found: dict[int, tuple[int, str | None]] = {}
    at, before, linked = 0, 0, False
    while at < len(words):
        end = _name_end(words, at)
        if end == at:
            at += 1
            continue
        # In `Sydney, Australia` and `the corner of A and B`, the second is treated like the first.
        follows = at - before == 1 and words[before].text in (",", "and", "/") and linked
        noun = None if follows else _noun_of_name(words, at, end)
        found[at] = end - at, noun
        at = before = end
        linked = noun is None
    return found


def _name_end(words: list[Word], at: int) -> int:
    """End of the name that begins at `at`; `at` itself if none does."""
    end = at
    while end < len(words) and _in_name(words[end], first=end == 0):
        end += 1
        link = end
        while link < len(words) and words[link].text in NAME_LINKS and link - end < 2:
            link += 1
        linked = end < link < len(words) and words[link].capital
        if linked and _in_name(words[link], first=False):
            end = link
    run = words[at:end]
    if run and not any(_names_something(word, first=at == 0 and word is run[0]) for word in run):
        return at
    if len(run) > LONGEST_NAME:
        return at
    has_number = _has_number(words, max(end, at + 1))
    if not run:  # in lower case only with a number: `boeing 747`
        is_unknown = words[at].noun and not words[at].plural and not in_lexicon(words[at].text)
        return at + 2 if is_unknown and has_number else at
    if has_number:
        return end + 1
    landmark = end < len(words) and words[end].text in LANDMARKS and words[end].noun
    return end + 1 if landmark and not run[-1].text.endswith(DEMONYMS) else end


def _in_name(word: Word, first: bool) -> bool:
    """Whether a word may belong to a name."""
    proper = word.tag in PROPER_TAGS
    if not (proper or word.capital):  # most words
        return False
    if _NAME.fullmatch(word.written) is None or word.text in COLOURS:
        return False
    if proper:
        return word.capital or not in_lexicon(word.text)
    if _NUMBERED.fullmatch(word.text):
        return True
    return not first and word.tag in (*NOUN_TAGS, "JJ", "VBG", "VBN", "FW", "CD")


def _names_something(word: Word, first: bool) -> bool:
    """Whether a word makes its sequence a name."""
    is_acronym = word.written.rstrip("s").isupper()  # `TV`, `DVDs`
    return (
        word.tag in PROPER_TAGS
        or _NUMBERED.fullmatch(word.text) is not None
        or not (first or is_acronym or in_lexicon(word.text))
    )


def _has_number(words: list[Word], at: int) -> bool:
    """Whether the word at `at` is a number that belongs to the name before it (`Boeing 747`)."""
    if at >= len(words) or not words[at].text.isdigit():
        return False
    after = words[at + 1] if at + 1 < len(words) else None
    return words[at].start - words[at - 1].end <= 1 and not (after and after.plural)


def _noun_of_name(words: list[Word], at: int, end: int) -> str | None:
    run = words[at:end]
    texts = [word.text for word in run]
    after = words[end] if end < len(words) else None
    before = [word.text for word in words[max(at - 4, 0) : at] if word.text not in ("the", "a")]
    landmark = any(text in LANDMARKS for text in texts)
    if any(word.negated for word in run) or not DATES.isdisjoint(texts):
        return None
    if (after is not None and after.noun) or not ADDRESSES.isdisjoint(texts):
        return None
    if before and before[-1] in ("in", "from", "by") and not landmark:
        return None
    if not SPELLS.isdisjoint(before[-2:]) or before[-2:] in OF_SCENES:
        return None
    if len(run) == 1 and run[0].tag in ("NNS", "NNPS"):
        return singular(texts[0])
    return " ".join(texts).replace(" 's", "'s") if len("".join(texts)) > 1 else None
