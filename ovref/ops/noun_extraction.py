"""Extracts the nouns of a tagged caption: singular, lower-case, each with its character span.

Works on any spaCy `Doc` whose tokens carry Penn Treebank tags (`token.tag_`). `tagged_nouns` takes
the tagger's word for it; `nouns_of` has rules:

1. A token counts when it is tagged NN or NNS and is a word of letters, but not a known adjective
   (`snowy`). Hyphenated words (`t-shirt`) are one word, and count when their last part does. A
   single capitalised word that is in the lexicon is a common noun.
2. Verbs that taggers mistake for nouns do not count: a plural right after a noun with the article a
   or an (`a dish sits`), and a word in -ing beside a noun (`cutting pizza`, `cat sleeping`). Nor do
   measures (`two lane road`) and negated nouns (`no windows`, `without people or cars`).
3. Colours do not count. Nor do stop nouns (media, views, positions, quantities, times, games), and
   media that are also things (`painting`) where the caption says what they show.
4. Adjacent nouns form one compound (`brick wall`), except after a plural (`people kites`) or a
   person (`man skateboard`), where the caption or the tagger has lost a word in between. In a
   sequence longer than `LONGEST_COMPOUND` words, the first ones stay single. Known compounds
   (`dining table`, `black hole`) are joined whatever tags their first words have.
5. Nouns tagged plural are made singular (`ops.singular`). Taggers miss rare plurals (`zebras`), so
   a noun tagged singular also counts as plural where the lexicon has it as one.
6. With `include_proper`, names of things are nouns, one each (`ops.proper_names`).
7. Names of given classes take precedence over all of this, the longest first, and become the first
   name of their class. Names of several words, or one that is not in the lexicon, always count. Any
   other single word must be a noun by rules 1 to 3 and the last word of its compound: `kitchen
   table` matches the class `table`, but not the class `kitchen`. Known compounds and proper names
   stay whole. The nouns right before a class name in a compound describe it and do not count.
8. A repeated noun counts once, at its first mention.
"""

from collections.abc import Collection

from spacy.tokens import Doc

from ovref.ops.given_names import GivenNames, Mention, mentions
from ovref.ops.proper_names import name_sizes
from ovref.ops.word_lists import (
    AMOUNTS_OF,
    COMPOUNDS,
    DEPICTIONS,
    INVARIANT,
    MATERIALS,
    PERSONS,
    STOP_NOUNS,
    TAKES_FIRST,
)
from ovref.ops.words import NOUN_TAGS, Word, plain_words, words_of
from ovref.records import Noun

LONGEST_COMPOUND = 3
"""Maximum number of words in a compound that is not in the list of known ones."""

KNOWN = frozenset(tuple(compound.split()) for compound in COMPOUNDS)
KNOWN_BEGIN = frozenset(compound[0] for compound in KNOWN)
LONGEST_KNOWN = max(len(compound) for compound in KNOWN)
SHOWS = ("of", "showing", "depicting", "featuring", "style")
"""Words after a medium that introduce what it shows; before a noun, how it looks."""


def tagger_text(caption: str) -> str:
    """The caption as given to the tagger: in lower case if its capitals carry no meaning.

    Captions all in capitals or With Every Word Capitalised would be tagged as names. The length,
    and so all character spans, stay the same.
    """
    words = [word for word in caption.split() if word[0].isalpha()]
    capitals = sum(word[0].isupper() for word in words)
    if len(words) < 3 or capitals <= 0.6 * len(words):
        return caption
    return "".join(low if len(low := letter.lower()) == 1 else letter for letter in caption)


def tagged_nouns(
    doc: Doc, *, stop_nouns: Collection[str] = (), max_nouns: int | None = None
) -> tuple[Noun, ...]:
    """Every word of a caption that is tagged as a common noun, in order of mention and each once,
    by none of the rules of `nouns_of` (FOSSIL section 3.2: the nouns of a parser).

    Args: as of `nouns_of`.
    """
    found: dict[str, Noun] = {}
    for word in plain_words(doc):
        letters = any(map(str.isalpha, word.text))
        if word.tag in NOUN_TAGS and letters and word.lemma not in stop_nouns:
            noun = Noun(text=word.lemma, start=word.start, end=word.end)
            found.setdefault(noun.text, noun)
    return tuple(found.values())[:max_nouns]


def nouns_of(
    doc: Doc,
    *,
    include_proper: bool = True,
    compounds: bool = True,
    stop_nouns: Collection[str] = STOP_NOUNS,
    max_nouns: int | None = None,
    given: GivenNames | None = None,
) -> tuple[Noun, ...]:
    """The nouns of one tagged caption, in order of mention.

    Args:
        doc: tagged; its text has the caption's length (`tagger_text`), so spans fit the caption.
        include_proper: also count names of things.
        compounds: join adjacent nouns; if False, each word is a noun. Names stay whole.
        stop_nouns: singular nouns that never count.
        max_nouns: number of nouns to keep, from the first on; None keeps all.
        given: class names (rule 7).
    """
    words = words_of(doc)
    known = {at: size for at in range(len(words)) if (size := _known_size(words, at))}
    names = _free_names(words, known) if include_proper else {}
    classes: dict[int, Mention] = {}
    if given is not None:
        classes = _mentioned(words, given, known, names, compounds, stop_nouns)
        taken = {at for mention in classes.values() for at in range(mention.start, mention.end)}
        known = {at: n for at, n in known.items() if taken.isdisjoint(range(at, at + n))}
        names = {at: n for at, n in names.items() if taken.isdisjoint(range(at, at + n[0]))}
    others = known.keys() | names.keys() | classes.keys()
    found: dict[str, Noun] = {}
    at = 0
    while at < len(words):
        noun = None
        if at in classes:
            size = classes[at].size
            start, end = words[at].start, words[at + size - 1].end
            noun = Noun(text=classes[at].text, start=start, end=end)
        elif at in names:
            size, text = names[at]
            if text is not None and text not in stop_nouns:
                noun = Noun(text=text, start=words[at].start, end=words[at + size - 1].end)
        else:
            is_known = compounds and at in known
            size = known[at] if is_known else 1
            if compounds and not is_known:
                size = _run_size(words, at, stop_nouns, others)
            end = at + size
            describes = (
                compounds
                and not is_known
                and end in classes
                and _may_begin(words[end - 1], stop_nouns)
                and (words[end].noun or classes[end].size > 1)
            )
            if not describes:
                noun = _noun(words, at, end, stop_nouns, known=is_known)
        if noun is not None:
            found.setdefault(noun.text, noun)
        at += size
    return tuple(found.values())[:max_nouns]


def _mentioned(
    words: list[Word],
    given: GivenNames,
    known: dict[int, int],
    names: dict[int, tuple[int, str | None]],
    compounds: bool,
    stop_nouns: Collection[str],
) -> dict[int, Mention]:
    """The class mentions that count, by index of their first word; they do not overlap."""
    whole = {at + step for at, size in known.items() if compounds for step in range(size)}
    whole |= {at + step for at, (size, _) in names.items() for step in range(size)}
    found: dict[int, Mention] = {}
    taken: set[int] = set()
    for mention in mentions(words, given):
        at, end = mention.start, mention.end
        if not taken.isdisjoint(range(at, end)):
            continue
        if not mention.sure:
            joined = compounds and end < len(words) and _joins(words, end, stop_nouns)
            if at in whole or joined or not _noun(words, at, end, stop_nouns, known=False):
                continue
        found[at] = mention
        taken.update(range(at, end))
    return found


def _free_names(words: list[Word], known: dict[int, int]) -> dict[int, tuple[int, str | None]]:
    """The names that overlap no known compound."""
    taken = {at + step for at, size in known.items() for step in range(size)}
    return {
        at: (size, text)
        for at, (size, text) in name_sizes(words).items()
        if taken.isdisjoint(range(at, at + size))
    }


def _known_size(words: list[Word], at: int) -> int:
    """Number of words of the known compound that begins at `at`; 0 if there is none."""
    if words[at].text not in KNOWN_BEGIN:
        return 0
    for size in range(LONGEST_KNOWN, 1, -1):
        group = words[at : at + size]
        if len(group) < size or not (group[-1].noun or group[-1].tag.startswith("NNP")):
            continue
        if (*(word.text for word in group[:-1]), group[-1].lemma) in KNOWN:
            return size
    return 0


def _run_size(
    words: list[Word], at: int, stop_nouns: Collection[str], others: Collection[int]
) -> int:
    """Number of adjacent words from `at` on that form one noun."""
    end = at + 1
    while end < len(words) and end not in others and _joins(words, end, stop_nouns):
        end += 1
    return end - at if end - at <= LONGEST_COMPOUND else 1


def _joins(words: list[Word], at: int, stop_nouns: Collection[str]) -> bool:
    """Whether a word forms one noun with the word before it."""
    word = words[at]
    return _may_begin(words[at - 1], stop_nouns) and word.noun and word.lemma not in stop_nouns


def _may_begin(word: Word, stop_nouns: Collection[str]) -> bool:
    plural = word.plural and word.text not in INVARIANT
    return word.noun and not plural and word.lemma not in stop_nouns and word.text not in PERSONS


def _noun(
    words: list[Word], at: int, end: int, stop_nouns: Collection[str], *, known: bool
) -> Noun | None:
    last = words[end - 1]
    if not (last.noun or known) or (last.negated and words[at].text != "no"):
        return None
    group = words[at:end]
    after = words[end] if end < len(words) else None
    text = " ".join([*(word.text for word in group[:-1]), last.lemma])
    if text in stop_nouns or (last.lemma in stop_nouns and not known):
        return None
    if after and (text, after.text) == ("close", "up"):
        return None
    if after and after.text == "of" and text in AMOUNTS_OF:
        return None
    if after and after.noun and after.lemma in TAKES_FIRST and after.lemma in stop_nouns:
        return None  # `tennis match` means the match, which has no region
    if not known and (_is_depiction(words, at, end) or _says_material(words, end, group)):
        return None
    return Noun(text=text, start=group[0].start, end=last.end)


def _is_depiction(words: list[Word], at: int, end: int) -> bool:
    """Whether a noun is the medium of the image described, rather than a thing in it."""
    if words[end - 1].lemma not in DEPICTIONS:
        return False
    if end < len(words) and words[end].text in SHOWS:
        return True
    begin = at
    while begin > 0 and words[begin - 1].tag in ("JJ", "DT", "NN", "CD"):
        begin -= 1
    alone = begin > 0 and words[begin - 1].text == ","
    return alone and (end == len(words) or words[end].text in (",", ".", "by"))


def _says_material(words: list[Word], end: int, group: list[Word]) -> bool:
    """Whether a noun only describes the medium after it: `pencil drawing`."""
    if any(word.text not in MATERIALS for word in group):
        return False
    medium = words[end] if end < len(words) else None
    return (
        medium is not None
        and medium.noun
        and (medium.lemma in DEPICTIONS or medium.lemma in MATERIALS or medium.lemma in STOP_NOUNS)
    )
