"""Which nouns a tagged caption holds: singular, lower-case, each with its character span.

Works on any spaCy `Doc` whose tokens carry Penn Treebank tags (`token.tag_`). The rules:

1. A token counts when it is tagged NN or NNS (with `include_proper` NNP and NNPS too) and is a word
   of letters. Words tied by hyphens (`t-shirt`) are one word, and count when their last part does.
2. Two kinds of verbs that taggers take for nouns do not count: a plural right after a noun that has
   the article a or an (`a dish sits`), and a word in -ing beside a noun (`cutting pizza`, `cat
   sleeping`).
3. Colours do not count; nor do stop nouns (views, positions, quantities, times, games).
4. Adjacent nouns make one compound (`brick wall`), except after a plural (`people kites`) or a
   person (`man skateboard`): there the caption or the tagger has lost a word in between. Of more
   than `LONGEST_COMPOUND` words the first ones stay single. Known compounds (`dining table`,
   `parking lot`) are joined whatever their first words are tagged.
5. Nouns tagged plural are made singular. Taggers slip on rare plurals (`zebras`), so one tagged
   singular counts as plural too where it ends as plurals do and is not in `SINGULARS_IN_S`.
6. A noun said twice counts once, where it is said first.
"""

from collections.abc import Collection
from functools import lru_cache

from spacy.tokens import Doc, Token

from ovref.ops.word_lists import (
    COLOURS,
    COMPOUNDS,
    DRINKS,
    GAMES,
    ING_NOUNS,
    INVARIANT,
    IRREGULAR,
    PERSONS,
    SINGULARS_IN_S,
    STOP_NOUNS,
)
from ovref.records import Noun

NOUN_TAGS = ("NN", "NNS")
PROPER_TAGS = ("NNP", "NNPS")
PLURAL_TAGS = ("NNS", "NNPS")
LONGEST_COMPOUND = 3
"""Words of a compound that is not in the list of known ones."""
SHORTEST_NOUN = 2
"""Letters."""

KNOWN = frozenset(tuple(compound.split()) for compound in COMPOUNDS)
LONGEST_KNOWN = max(len(compound) for compound in KNOWN)


def tagger_text(caption: str) -> str:
    """The caption as the tagger should see it: in lower case where its capitals mean nothing.

    Captions all in capitals or With Every Word Capitalised would be taken for names. The length
    stays the same, so character spans do.
    """
    words = [word for word in caption.split() if word[0].isalpha()]
    capitals = sum(word[0].isupper() for word in words)
    if len(words) < 3 or capitals <= 0.6 * len(words):
        return caption
    return "".join(low if len(low := letter.lower()) == 1 else letter for letter in caption)


def nouns_of(
    doc: Doc,
    *,
    include_proper: bool = False,
    compounds: bool = True,
    stop_nouns: Collection[str] = STOP_NOUNS,
    max_nouns: int | None = None,
) -> tuple[Noun, ...]:
    """The nouns of one tagged caption, in order of mention.

    Args:
        doc: tagged; its text has the caption's length (`tagger_text`), so spans fit the caption.
        include_proper: count proper nouns (NNP, NNPS) too.
        compounds: join adjacent nouns; else each word is a noun of its own.
        stop_nouns: singular nouns that never count.
        max_nouns: keep the first so many; None keeps all.
    """
    words = _words(doc, NOUN_TAGS + PROPER_TAGS if include_proper else NOUN_TAGS)
    _unsay_verbs(words)
    _tell_glasses(words)
    found: dict[str, Noun] = {}
    at = 0
    while at < len(words):
        known = _known_size(words, at) if compounds else 0
        size = known or (_run_size(words, at, stop_nouns) if compounds else 1)
        noun = _noun(words, at, at + size, stop_nouns, known=known > 0)
        if noun is not None:
            found.setdefault(noun.text, noun)
        at += size
    return tuple(found.values())[:max_nouns]


class _Word:
    """One word of the caption: a token, or tokens tied by hyphens."""

    def __init__(self, tokens: list[Token], tags: tuple[str, ...]):
        last = tokens[-1]
        self.start, self.end = tokens[0].idx, last.idx + len(last)
        self.text = "".join(token.text for token in tokens).lower()
        self.tag = last.tag_
        self.plural = last.tag_ in PLURAL_TAGS or (last.tag_ == "NN" and _looks_plural(self.text))
        self.lemma = singular(self.text) if self.plural else self.text
        numbered = len(tokens) > 1 and tokens[0].tag_ == "CD"  # `two-story` tells of a house
        letters = self.text.replace("-", "").replace("'", "")
        self.noun = (
            last.tag_ in tags
            and not numbered
            and letters.isalpha()
            and len(letters) >= SHORTEST_NOUN
            and self.text not in COLOURS
        ) or (self.text == "orange" and last.tag_ in ("NN", "JJ") and _is_fruit(last))


def _words(doc: Doc, tags: tuple[str, ...]) -> list[_Word]:
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
    return [_Word(group, tags) for group in groups]


def _unsay_verbs(words: list[_Word]) -> None:
    article = False
    for at, word in enumerate(words):
        before = words[at - 1] if at else None
        after = words[at + 1] if at + 1 < len(words) else None
        if word.text in ("a", "an"):
            article = True
        elif word.noun and word.plural and word.text not in INVARIANT:
            if article and before.noun and before.text != "couple":
                word.noun = False
            article = False
        elif not (word.noun or word.tag in ("JJ", "VBN", "VBG", "CD")):
            article = False
        beside_noun = (before is not None and before.noun) or (after is not None and after.noun)
        if beside_noun and word.text.endswith("ing") and word.text not in ING_NOUNS:
            word.noun = False


def _tell_glasses(words: list[_Word]) -> None:
    """`wine glasses` and `glasses of milk` are many of one thing; other glasses are worn."""
    for at, word in enumerate(words):
        before = words[at - 1].text if at else ""
        after = words[at + 1].text if at + 1 < len(words) else ""
        if word.text == "glasses" and (before in DRINKS or after == "of"):
            word.lemma = "glass"


def _looks_plural(word: str) -> bool:
    last = word.rpartition("-")[2]
    return last in IRREGULAR or (
        len(last) > 3
        and last.endswith("s")
        and not last.endswith(("ss", "us", "is", "ics", "'s"))
        and last not in SINGULARS_IN_S
    )


def _is_fruit(token: Token) -> bool:
    """Whether a noun `orange` is the fruit: it has an article or the like, and tells of no noun."""
    before = token.nbor(-1) if token.i else None
    after = [token.nbor(step) for step in (1, 2) if token.i + step < len(token.doc)]
    if before is None or before.tag_ not in ("DT", "CD", "VBN", "JJ") or before.lower_ in COLOURS:
        return False
    if after and after[0].tag_ in ("NN", "NNS", "NNP", "JJ", "HYPH", "VBN"):
        return False
    return not (len(after) == 2 and (after[1].lower_ in COLOURS or after[1].tag_ == "JJ"))


def _known_size(words: list[_Word], at: int) -> int:
    """How many words from `at` on are a known compound; 0 for none."""
    for size in range(LONGEST_KNOWN, 1, -1):
        group = words[at : at + size]
        if len(group) < size or not group[-1].noun:
            continue
        if (*(word.text for word in group[:-1]), group[-1].lemma) in KNOWN:
            return size
    return 0


def _run_size(words: list[_Word], at: int, stop_nouns: Collection[str]) -> int:
    """How many words from `at` on make one noun because they stand together."""
    end = at + 1
    while (
        end < len(words)
        and _may_begin(words[end - 1], stop_nouns)
        and words[end].noun
        and words[end].lemma not in stop_nouns
        and not _known_size(words, end)
    ):
        end += 1
    return end - at if end - at <= LONGEST_COMPOUND else 1


def _may_begin(word: _Word, stop_nouns: Collection[str]) -> bool:
    plural = word.plural and word.text not in INVARIANT
    return word.noun and not plural and word.lemma not in stop_nouns and word.text not in PERSONS


def _noun(
    words: list[_Word], at: int, end: int, stop_nouns: Collection[str], *, known: bool
) -> Noun | None:
    group, last = words[at:end], words[end - 1]
    after = words[end] if end < len(words) else None
    text = " ".join([*(word.text for word in group[:-1]), last.lemma])
    if not last.noun or text in stop_nouns or (last.lemma in stop_nouns and not known):
        return None
    if after and (text, after.text) in (("couple", "of"), ("base", "of"), ("body", "of")):
        return None
    if after and after.noun and after.lemma in GAMES and after.lemma in stop_nouns:
        return None  # `tennis match` names the match, which is no region
    return Noun(text=text, start=group[0].start, end=last.end)


@lru_cache(maxsize=65536)
def singular(plural: str) -> str:
    """The singular of a lower-case plural, hyphenated and irregular ones too.

    For plurals only: of a singular such as `gas` it would make `ga`. Words that are always plural
    (`pants`) stay.
    """
    head, hyphen, word = plural.rpartition("-")
    if plural in INVARIANT or word in INVARIANT:
        return plural
    if plural in IRREGULAR:
        return IRREGULAR[plural]
    return head + hyphen + _singular_word(word)


def _singular_word(word: str) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("men") and len(word) > 4:
        return word[:-3] + "man"
    if word.endswith("people") or word.endswith("children"):
        return word.replace("people", "person").replace("children", "child")
    if not word.endswith("s") or word.endswith(("ss", "us", "is")) or len(word) < 3:
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zzes")):
        return word[:-2]
    if word.endswith("oes"):
        return word[:-2]
    if word.endswith("uses") and not word.endswith(("ouses", "auses")):
        return word[:-2]
    return word[:-1]
