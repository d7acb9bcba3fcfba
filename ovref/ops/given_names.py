"""Finds the names of user-given classes in captions, regardless of case and number."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from spacy.tokens import Doc

from ovref.errors import InputError
from ovref.identity import normalised
from ovref.ops.singular import in_lexicon, is_plural, noun_lemmas, singular
from ovref.ops.word_lists import INVARIANT
from ovref.ops.words import Word, words_of


@dataclass(frozen=True, kw_only=True)
class GivenNames:
    """Class names, as words in lower case and in the singular."""

    classes: dict[tuple[str, ...], str] = field(default_factory=dict)
    """The class of each name, in lower case."""
    longest: dict[str, int] = field(default_factory=dict)
    """Number of words in the longest name that begins with a given word."""


@dataclass(frozen=True, kw_only=True)
class Mention:
    """Words of a caption that name a class."""

    start: int
    size: int
    """Index of the first word, and number of words."""
    text: str
    """The class."""
    sure: bool
    """Whether the name is unambiguous: several words, or one that is not in the lexicon."""

    @property
    def end(self) -> int:
        return self.start + self.size


def given_names(classes: Sequence[Sequence[str]], tokenise: Callable[[str], Doc]) -> GivenNames:
    """Prepares class names for matching.

    Args:
        classes: names of each class, its own name first. A synonym that several classes share
            belongs to the first of them.
        tokenise: splits a name into words in the way captions are split; `nlp.make_doc`.

    Raises:
        InputError: two classes have the same first name, regardless of case and number.
    """
    found: dict[tuple[str, ...], str] = {}
    longest: dict[str, int] = {}
    for names in classes:
        own = normalised(names[0]).lower()
        for name in names:
            key = tuple(_key(word.text) for word in words_of(tokenise(normalised(name))))
            before = found.setdefault(key, own)
            if name == names[0] and before != own:
                raise InputError(
                    f"the classes {before!r} and {own!r} cannot be told apart in captions, "
                    f"where case and plural do not count, or {own!r} is a synonym of {before!r}: "
                    "make them one class, or leave one out"
                )
            longest[key[0]] = max(longest.get(key[0], 0), len(key))
    return GivenNames(classes=found, longest=longest)


def mentions(words: list[Word], given: GivenNames) -> Iterator[Mention]:
    """All mentions of classes, longest first, then in order; they may overlap.

    Negated mentions (`without a garlic press`) are skipped.
    """
    keys = [_key(word.text) for word in words]
    found = []
    for start, key in enumerate(keys):
        most = max(given.longest.get(first, 0) for first in (key, words[start].lemma))
        for end in range(start + 1, min(start + most, len(words)) + 1):
            text = given.classes.get(tuple(keys[start:end]))
            if text is None:  # neighbours may decide whether it is a plural: `wine glasses`
                text = given.classes.get((*keys[start : end - 1], words[end - 1].lemma))
            if text is None or (words[end - 1].negated and words[start].text != "no"):
                continue
            sure = end - start > 1 or not in_lexicon(words[start].text)
            found.append(Mention(start=start, size=end - start, text=text, sure=sure))
    yield from sorted(found, key=lambda mention: (-mention.size, mention.start))


def _key(word: str) -> str:
    lemmas = noun_lemmas(word)
    irregular = lemmas and word not in lemmas and word not in INVARIANT  # `men`, `mice`
    return singular(word) if irregular or is_plural(word) else word
