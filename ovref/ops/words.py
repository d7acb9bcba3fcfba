"""The words of a tagged caption, with nouns and negated words marked.

These are rules 1 and 2 of `ops.noun_extraction`.
"""

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


class Word:
    """One word of the caption: a token, or hyphenated tokens."""

    def __init__(self, tokens: list[Token]):
        last = tokens[-1]
        self.start, self.end = tokens[0].idx, last.idx + len(last)
        self.written = "".join(token.text for token in tokens)
        self.text = self.written.lower()
        self.tag = last.tag_
        self.capital = self.written[0].isupper()
        self.plural = last.tag_ in PLURAL_TAGS or (last.tag_ == "NN" and is_plural(self.text))
        self.lemma = singular(self.text) if self.plural else self.text
        numbered = len(tokens) > 1 and tokens[0].tag_ == "CD"  # `two-story` describes a house
        letters = self.text.replace("-", "").replace("'", "")
        self.is_word = (
            not numbered
            and letters.isalpha()
            and len(letters) >= SHORTEST_NOUN
            and self.text not in COLOURS
            and not is_adjective_only(self.text)
        )
        self.noun = (last.tag_ in NOUN_TAGS and self.is_word) or (
            self.text == "orange" and last.tag_ in ("NN", "JJ") and _is_fruit(last)
        )
        self.negated = False


def words_of(doc: Doc) -> list[Word]:
    """The words of a caption, with nouns marked."""
    groups: list[list[Token]] = []
    for token in doc:
        if token.is_space:
            continue
        tied = (
            groups
            and not groups[-1][-1].whitespace_
            and (token.text == "-" or groups[-1][-1].text == "-")
            and groups[-1][0].text[0].isalnum()
        )
        if tied:
            groups[-1].append(token)
        else:
            groups.append([token])
    words = [Word(group) for group in groups]
    _mark_common_names(words)
    _unmark_verbs(words)
    _unmark_measures(words)
    _mark_glasses(words)
    _mark_negated(words)
    return words


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
        before = words[at - 1].text if at else ""
        after = words[at + 1].text if at + 1 < len(words) else ""
        if word.text == "glasses" and (before in DRINKS or after == "of"):
            word.lemma = "glass"


def _mark_negated(words: list[Word]) -> None:
    """Marks the nouns of a noun phrase after `no` or `without`."""
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
