"""Singulars of English nouns: from a lexicon, and by rules for words that it lacks.

The lexicon is lemminflect's, from the SPECIALIST Lexicon of the National Library of Medicine; only
its dictionary is used (its model of unknown words is a pickle).
"""

from functools import lru_cache

from ovref.ops.word_lists import INVARIANT, IRREGULAR, SINGULARS_IN_S


@lru_cache(maxsize=65536)
def singular(plural: str) -> str:
    """The singular of a lower-case plural, including hyphenated and irregular ones.

    Unchanged are singulars that end in s (`rhinoceros`) and are in the lexicon or in
    `SINGULARS_IN_S`, and words that are always plural (`pants`).
    """
    head, hyphen, word = plural.rpartition("-")
    for whole in (plural, word):
        if whole in INVARIANT or whole in SINGULARS_IN_S:
            return plural
    if plural in IRREGULAR:
        return IRREGULAR[plural]
    if word in IRREGULAR:
        return head + hyphen + IRREGULAR[word]
    lemmas = noun_lemmas(plural)
    if lemmas:
        return lemmas[0]
    return head + hyphen + ((noun_lemmas(word) or (_by_rule(word),))[0] if word else "")


@lru_cache(maxsize=65536)
def is_plural(word: str) -> bool:
    """Whether a lower-case word that was tagged singular is in fact a plural."""
    last = word.rpartition("-")[2]
    if last in IRREGULAR:
        return True
    if not last.endswith("s") or last in SINGULARS_IN_S or last in INVARIANT:
        return False
    lemmas = noun_lemmas(last)
    if lemmas:
        return last not in lemmas
    return len(last) > 3 and not last.endswith(("ss", "us", "is", "ics", "'s"))


def noun_lemmas(word: str) -> tuple[str, ...]:
    """The lexicon's singulars of a singular or plural noun; empty for other words."""
    return _lemmas(word).get("NOUN", ())


def in_lexicon(word: str) -> bool:
    """Whether the word is in the lexicon, as any part of speech."""
    return bool(_lemmas(word))


@lru_cache(maxsize=65536)
def is_adjective_only(word: str) -> bool:
    """Whether a word ends like an adjective and is no noun in the lexicon: `snowy`."""
    if not word.endswith(("y", "less")):
        return False
    lemmas = _lemmas(word)
    return "ADJ" in lemmas and "NOUN" not in lemmas


@lru_cache(maxsize=16384)
def _lemmas(word: str) -> dict[str, tuple[str, ...]]:
    from lemminflect import getAllLemmas  # loads 80,000 words, and copies what it returns

    return getAllLemmas(word)


def _by_rule(word: str) -> str:
    if word.endswith("people") or word.endswith("children"):
        return word.replace("people", "person").replace("children", "child")
    if word.endswith("men") and len(word) > 4 and noun_lemmas(word[:-3]):
        return word[:-3] + "man"  # of a noun: `snowmen`, not `ramen`
    if word.endswith("eaux"):
        return word[:-1]
    if not word.endswith("s") or word.endswith(("ss", "aurus")) or len(word) < 3:
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-1] if noun_lemmas(word[:-1]) or len(word) == 5 else word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zzes")):
        return word[:-2]
    if word.endswith("oes"):
        return word[:-2]
    if word.endswith("opses"):
        return word[:-2]
    if word.endswith("uses") and not word.endswith(("ouses", "auses")):
        return word[:-2]
    return word[:-1]
