"""Reads the Universal Dependencies English Web Treebank as the noun tagger sees it."""

from dataclasses import dataclass
from pathlib import Path

from ovref.ops.words import NOUN_TAGS

PHRASE_WORDS = (3, 16)
"""Fewest and most words of the noun phrases that are cut out of the trees."""


@dataclass(frozen=True)
class Token:
    """One word of the treebank."""

    word: str
    tag: str
    head: int
    """Index in the sentence; -1 for the root."""
    start: int
    """First character in the sentence's text."""
    noun: bool
    """Universal tag NOUN."""
    space: bool
    """A space follows in the text."""


@dataclass(frozen=True)
class Sentence:
    """One sentence of the treebank, as written and as annotated."""

    text: str
    tokens: tuple[Token, ...]


def read_conllu(path: str | Path) -> list[Sentence]:
    """The sentences of a CoNLL-U file whose words can all be found in their text."""
    sentences, text, rows = [], "", []
    for line in [*Path(path).read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("# text = "):
            text = line.removeprefix("# text = ")
        elif line and not line.startswith("#"):
            cells = line.split("\t")
            if cells[0].isdigit():  # no ranges of multi-word tokens, no empty nodes
                rows.append(cells)
        elif not line and rows:
            sentences.append(_sentence(text, rows))
            rows = []
    return [sentence for sentence in sentences if sentence is not None]


def _sentence(text: str, rows: list[list[str]]) -> Sentence | None:
    tokens, position = [], 0
    for _, word, _, upos, xpos, features, head, *_ in rows:
        start = text.find(word, position)
        if start < 0:
            return None
        position = start + len(word)
        noun = upos == "NOUN"
        tag = _tag(noun, xpos, features)
        space = text[position : position + 1].isspace()
        tokens.append(Token(word, tag, int(head) - 1, start, noun, space))
    return Sentence(text, tuple(tokens))


def _tag(noun: bool, xpos: str, features: str) -> str:
    if noun:
        return "NNS" if xpos == "NNS" or "Number=Plur" in features else "NN"
    return "PRP" if xpos in NOUN_TAGS else xpos


def noun_phrases(sentence: Sentence) -> list[tuple[int, int]]:
    """Spans [first, end) of tokens that are the whole subtree of one common noun.

    A preposition, conjunction or the like in front is left out, as captions begin with the phrase.
    """
    children: dict[int, list[int]] = {}
    for index, token in enumerate(sentence.tokens):
        children.setdefault(token.head, []).append(index)
    spans = []
    for index, token in enumerate(sentence.tokens):
        if not token.noun:
            continue
        subtree, todo = [], [index]
        while todo:
            node = todo.pop()
            subtree.append(node)
            todo.extend(children.get(node, ()))
        first, end = min(subtree), max(subtree) + 1
        gapless = end - first == len(subtree)
        first += sentence.tokens[first].tag in ("IN", "TO", "CC", ",", "POS")
        if gapless and PHRASE_WORDS[0] <= end - first <= PHRASE_WORDS[1]:
            spans.append((first, end))
    return spans
