"""The words of a tagged caption, with nouns and negated words marked.

These are rules 1 and 2 of `ops.noun_extraction`.
"""

from functools import lru_cache

from spacy.tokens import Doc, Token

from ovref.ops.singular import is_adjective_only, is_plural, noun_lemmas, singular
from ovref.ops.word_lists import (
    COLOURS,
    DRINKS,
    ING_NOUNS,
    INVARIANT,
    NAME_LINKS,
    NEGATIONS,
    NUMBER_WORDS,
)

NOUN_TAGS = ("NN", "NNS")
PROPER_TAGS = ("NNP", "NNPS")
PLURAL_TAGS = ("NNS", "NNPS")
SHORTEST_NOUN = 2
"""Length in letters."""
NEGATING_PAIRS = (
    ("free", "of"), ("devoid", "of"), ("empty", "of"), ("not", "a"), ("not", "an"), ("not", "any"),
)  # fmt: skip
NEGATING = frozenset(NEGATIONS).union(first for first, _ in NEGATING_PAIRS)
"""Words without one of which nothing is negated."""


class Word:
    """One word of the caption: a token, or hyphenated tokens."""

    __slots__ = (
        "capital", "end", "is_word", "lemma", "negated", "noun", "plural", "start", "tag", "text",
        "written",
    )  # fmt: skip

    def __init__(self, tokens: list[Token], written: str):
        first, last = tokens[0], tokens[-1]
        tag = last.tag_
        text = written.lower()
        self.start = first.idx
        self.end = self.start + len(written)
        self.written = written
        self.text = text
        self.tag = tag
        self.capital = written[0].isupper()
        self.plural = tag in PLURAL_TAGS or (tag == "NN" and is_plural(text))
        self.lemma = singular(text) if self.plural else text
        numbered = len(tokens) > 1 and first.tag_ == "CD"  # `two-story` describes a house
        self.is_word = not numbered and _may_be_noun(text)
        self.noun = (tag in NOUN_TAGS and self.is_word) or (
            text == "orange" and tag in ("NN", "JJ") and _is_fruit(last)
        )
        self.negated = False


@lru_cache(maxsize=65536)
def _may_be_noun(text: str) -> bool:
    letters = text.replace("-", "").replace("'", "")
    return (
        letters.isalpha()
        and len(letters) >= SHORTEST_NOUN
        and text not in COLOURS
        and not is_adjective_only(text)
    )


def words_of(doc: Doc) -> list[Word]:
    """The words of a caption, with nouns marked."""
    words = plain_words(doc)
    _mark_common_names(words)
    _unmark_verbs(words)
    _unmark_measures(words)
    _mark_glasses(words)
    _mark_negated(words)
    return words


def plain_words(doc: Doc) -> list[Word]:
    """The words of a caption by rule 1 alone; hyphenated tokens are one word."""
    groups: list[tuple[list[Token], str]] = []
    before = ""
    for token in doc:
        text = token.text
        if text.isspace():
            continue
        tied = (
            groups
            and (text == "-" or before == "-")
            and not groups[-1][0][-1].whitespace_
            and groups[-1][1][0].isalnum()
        )
        if tied:
            tokens, written = groups[-1]
            groups[-1] = ([*tokens, token], written + text)
        else:
            groups.append(([token], text))
        before = text
    return [Word(tokens, written) for tokens, written in groups]


def _mark_common_names(words: list[Word]) -> None:
    """A single capitalised word of the lexicon is a common noun: `Giraffes eating`, `the Moon`."""
    for at, word in enumerate(words):
        if word.tag not in PROPER_TAGS or not word.is_word or not noun_lemmas(word.text):
            continue
        near = [words[to] if 0 <= to < len(words) else None for to in range(at - 2, at + 3)]
        if any(other and other.tag in PROPER_TAGS for other in (near[1], near[3])):
            continue
        if any(
            link and other and link.text in NAME_LINKS and other.capital
            for link, other in ((near[1], near[0]), (near[3], near[4]))
        ):
            continue  # `Statue of Liberty`
        if at > 0 and near[3] and near[3].tag in NOUN_TAGS:
            continue  # `an Apple laptop`
        if near[1] and near[1].text in ("in", "from"):
            continue  # `in China`
        word.tag = "NNS" if word.tag == "NNPS" or is_plural(word.text) else "NN"
        word.plural = word.tag == "NNS"
        word.lemma = singular(word.text) if word.plural else word.text
        word.noun = True


def _unmark_verbs(words: list[Word]) -> None:
    article = False
    for at, word in enumerate(words):
        before = words[at - 1] if at else None
        after = words[at + 1] if at + 1 < len(words) else None
        if word.text in ("a", "an"):
            article = True
        elif word.noun and word.plural and word.text not in INVARIANT:
            if article and before and before.noun and before.text != "couple":
                word.noun = False
            elif article and before and before.text in ("a", "an") and not noun_lemmas(word.text):
                word.plural, word.lemma = False, word.text  # `a brachiosaurus`
            article = False
        elif not (word.noun or word.tag in ("JJ", "VBN", "VBG", "CD")):
            article = False
        beside_noun = (before is not None and before.noun) or (after is not None and after.noun)
        if beside_noun and word.text.endswith("ing") and word.text not in ING_NOUNS:
            word.noun = False


def _unmark_measures(words: list[Word]) -> None:
    """In `two lane road`, unlike `two stop signs`, the number belongs to a measure of the road."""
    for number, unit, head in zip(words, words[1:], words[2:], strict=False):
        counted = number.text in NUMBER_WORDS or (number.text.isdigit() and number.text != "1")
        if counted and all(word.noun and not word.plural for word in (unit, head)):
            unit.noun = unit.text in INVARIANT or head.text in INVARIANT


def _mark_glasses(words: list[Word]) -> None:
    """`wine glasses` and `glasses of milk` are plurals of glass; other glasses are eyewear."""
    for at, word in enumerate(words):
        if word.text != "glasses":
            continue
        before = words[at - 1].text if at else ""
        after = words[at + 1].text if at + 1 < len(words) else ""
        if before in DRINKS or after == "of":
            word.lemma = "glass"


def _mark_negated(words: list[Word]) -> None:
    """Marks the nouns of a noun phrase after `no` or `without`."""
    if NEGATING.isdisjoint([word.text for word in words]):  # most captions
        return
    negated = False
    for at, word in enumerate(words):
        before = words[at - 1].text if at else ""
        if word.text in NEGATIONS or (before, word.text) in NEGATING_PAIRS:
            negated = True
        elif word.text in ("a", "an", "any") and before in NEGATIONS:
            continue
        elif word.tag == "DT" and word.text != "any":
            negated = False  # `without windows and the door`
        elif not (
            word.noun
            or word.tag in (*NOUN_TAGS, *PROPER_TAGS, "DT", "JJ", "VBN", "CD", "POS")
            or word.text in ("or", "nor", "and", "of")
        ):
            negated = False
        word.negated = negated


def _is_fruit(token: Token) -> bool:
    """Whether a noun `orange` is the fruit: it has a determiner and modifies no other noun."""
    before = token.nbor(-1) if token.i else None
    after = [token.nbor(step) for step in (1, 2) if token.i + step < len(token.doc)]
    if before is None or before.tag_ not in ("DT", "CD", "VBN", "JJ") or before.lower_ in COLOURS:
        return False
    if after and after[0].tag_ in ("NN", "NNS", "NNP", "JJ", "HYPH", "VBN"):
        return False
    return not (len(after) == 2 and (after[1].lower_ in COLOURS or after[1].tag_ == "JJ"))
