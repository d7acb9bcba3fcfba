"""Trains the miniature's noun tagger on the Universal Dependencies English Web Treebank.

    pip install spacy-lookups-data
    python -m ovref.miniature.train_tagger --treebank DIR --output DIR

The treebank alone has too few words, so the tagger also gets a static vector for each word: its
Brown cluster (a class of words that occur in like contexts), the parts of speech that WordNet knows
it as, and whether it has a capital more often than not; all from spacy-lookups-data.
DIR holds `train.conllu`, `dev.conllu` and `test.conllu` of the official split. The tagger predicts
Penn Treebank tags, with two changes that make `NN`/`NNS` mean exactly "common noun": every token
whose universal tag is NOUN is `NN` or `NNS` by its number, and no other token is (`someone`, tagged
NN in the treebank, becomes PRP). Captions are mostly noun phrases without a final full stop and
often without capitals, so besides the treebank's sentences the tagger sees noun phrases cut out of
their dependency trees, and both now and then in lower case or without final punctuation. Words seen
rarely get a random identity now and then (word dropout), so that unknown words are read by their
letters and context. The dev set chooses the epoch; the test set is only reported.
"""

import argparse
import gzip
import importlib.util
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import spacy
from spacy.language import Language
from spacy.tokens import Doc
from spacy.training import Example
from spacy.vectors import Vectors
from thinc.api import Adam, Config, fix_random_seed

from ovref.ops.nouns import NOUN_TAGS

MODEL = """
[model]
@architectures = "spacy.Tagger.v2"

[model.tok2vec]
@architectures = "spacy.Tok2Vec.v2"

[model.tok2vec.embed]
@layers = "chain.v1"

[model.tok2vec.embed.*.features]
@layers = "concatenate.v1"

[model.tok2vec.embed.*.features.*.words]
@architectures = "spacy.MultiHashEmbed.v2"
width = 96
attrs = ["NORM", "PREFIX", "SUFFIX", "SHAPE"]
rows = [4500, 300, 2500, 600]
include_static_vectors = true

[model.tok2vec.embed.*.features.*.characters]
@architectures = "spacy.CharacterEmbed.v2"
width = 96
rows = 500
nM = 16
nC = 10
include_static_vectors = false
feature = "LOWER"

[model.tok2vec.embed.*.mix]
@layers = "with_array.v1"

[model.tok2vec.embed.*.mix.layer]
@layers = "Maxout.v1"
nO = 96
nI = 192
nP = 3
normalize = true
dropout = 0.0

[model.tok2vec.encode]
@architectures = "spacy.MaxoutWindowEncoder.v2"
width = 96
depth = 4
window_size = 1
maxout_pieces = 3
"""

SEED = 7
EPOCHS = 12
KNOWN_WORDS = 60_000
"""The most frequent words have a static vector."""
PREFIX_BITS = (4, 6)
"""Lengths of the first part of a cluster's path that count; a shorter one is more general."""
CLUSTER_DIMENSIONS = 64
"""Of a random direction for the whole path."""
CAPITAL_BOUNDS = (-2.0, 0.0, 2.0)
"""Of the logarithm of how often a word has a capital for once that it has none."""
DROPOUT = 0.25
LABEL_SMOOTHING = 0.05
LEARNING_RATE = 0.001
LAST_LEARNING_RATE = 0.00005
"""The rate falls from the one to the other in a straight line over the epochs."""
FIRST_WORDS_PER_BATCH = 300
LAST_WORDS_PER_BATCH = 1500
WORD_DROPOUT = 0.25
"""A word seen n times in training loses its identity with probability a / (a + n)."""
LOWER_SHARE = 0.35
"""Of the examples without proper nouns that are put in lower case."""
LOWER_SHARE_WITH_NAMES = 0.12
NO_STOP_SHARE = 0.5
"""Of the examples that lose their final punctuation."""
PHRASE_SHARE = 0.35
"""Of the noun phrases that are seen in one epoch."""
PHRASE_WORDS = (3, 16)
"""Fewest and most words of the noun phrases that are cut out of the trees."""

NOTICE = """# Notice

The model in this folder was trained on the Universal Dependencies English Web Treebank (UD English
EWT), https://universaldependencies.org/treebanks/en_ewt, by Natalia Silveira, Timothy Dozat,
Christopher Manning, Sebastian Schuster, Ethan Chi, John Bauer, Miriam Connor, Marie-Catherine de
Marneffe, Nathan Schneider, Sam Bowman, Hanzhi Zhu, Daniel Galbraith and other contributors. The
treebank is licensed under the Creative Commons Attribution-ShareAlike 4.0 International licence
(CC BY-SA 4.0), https://creativecommons.org/licenses/by-sa/4.0/. This folder is distributed under
that licence, and not under the Apache licence of the rest of the project.

Changes: the folder holds no text of the treebank but the weights of a part-of-speech tagger made by
`python -m ovref.miniature.train_tagger`, whose docstring tells how the annotation was altered for
it. `meta.json` holds the scores.

The words under `vocab/`, their Brown clusters and frequencies are from spacy-lookups-data,
Copyright (c) 2019 ExplosionAI GmbH, MIT licence:
https://github.com/explosion/spacy-lookups-data. Their parts of speech come from WordNet through the
same package: WordNet 3.0, Copyright 2006 by Princeton University, used under the WordNet licence,
https://wordnet.princeton.edu/license-and-commercial-use.

Reference: Natalia Silveira, Timothy Dozat, Marie-Catherine de Marneffe, Samuel Bowman, Miriam
Connor, John Bauer and Christopher D. Manning, "A Gold Standard Dependency Corpus for English",
LREC 2014.
"""


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


@dataclass(frozen=True)
class Sentence:
    """One sentence of the treebank, as written and as annotated."""

    text: str
    tokens: tuple[Token, ...]


Pair = tuple[list[str], list[str]]
"""Words and their tags."""


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
        tokens.append(Token(word, _tag(noun, xpos, features), int(head) - 1, start, noun))
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


def training_pairs(sentences: list[Sentence]) -> tuple[list[Pair], list[Pair]]:
    """The sentences, and their noun phrases."""
    whole, phrases = [], []
    for sentence in sentences:
        words = [token.word for token in sentence.tokens]
        tags = [token.tag for token in sentence.tokens]
        whole.append((words, tags))
        phrases += [
            (words[a:b], tags[a:b]) for a, b in noun_phrases(sentence) if b - a < len(words)
        ]
    return whole, phrases


def augmented(pair: Pair, rng: random.Random) -> Pair:
    """The pair, perhaps in lower case, perhaps without its final punctuation."""
    words, tags = pair
    if len(words) > 2 and tags[-1] in (".", ",", ":") and rng.random() < NO_STOP_SHARE:
        words, tags = words[:-1], tags[:-1]
    share = LOWER_SHARE_WITH_NAMES if {"NNP", "NNPS"} & set(tags) else LOWER_SHARE
    if rng.random() < share:
        words = [word.lower() for word in words]
    return words, tags


def example(nlp: Language, pair: Pair, counts: Counter[int], rng: random.Random) -> Example:
    """A spaCy Example whose rare words have now and then lost their identity."""
    words, tags = pair
    doc = Doc(nlp.vocab, words=words)
    for token in doc:
        if rng.random() < WORD_DROPOUT / (WORD_DROPOUT + counts[token.norm]):
            token.norm_ = f"?{rng.randrange(2000)}"
    return Example(doc, Doc(nlp.vocab, words=words, tags=tags))


def batches(examples: Iterator[Example], words_per_batch: float) -> Iterator[list[Example]]:
    """The examples in batches of at least so many words, but for the last."""
    batch, words = [], 0
    for item in examples:
        batch.append(item)
        words += len(item.predicted)
        if words >= words_per_batch:
            yield batch
            batch, words = [], 0
    if batch:
        yield batch


def score(
    nlp: Language, sentences: list[Sentence], *, own_tokens: bool = False, lower: bool = False
) -> dict[str, float]:
    """Precision, recall and F1 of common nouns; on the treebank's own words also tag accuracy.

    With `own_tokens` spaCy splits the text itself, and a noun counts as found only where its
    characters [start, end) are those of the treebank.
    """
    found = right = expected = tags_right = tags = 0
    if own_tokens:
        inputs = [s.text.lower() if lower else s.text for s in sentences]
    else:
        words = [[t.word.lower() if lower else t.word for t in s.tokens] for s in sentences]
        inputs = [Doc(nlp.vocab, words=line) for line in words]
    for sentence, doc in zip(sentences, nlp.pipe(inputs, batch_size=256), strict=True):
        gold = {(t.start, t.start + len(t.word)) for t in sentence.tokens if t.noun}
        if own_tokens:
            spans = [(t.idx, t.idx + len(t)) for t in doc]
        else:
            spans = [(t.start, t.start + len(t.word)) for t in sentence.tokens]
            tags_right += sum(a.tag_ == b.tag for a, b in zip(doc, sentence.tokens, strict=True))
            tags += len(doc)
        mine = {span for span, t in zip(spans, doc, strict=True) if t.tag_ in NOUN_TAGS}
        found, right, expected = found + len(mine), right + len(mine & gold), expected + len(gold)
    result = {
        "noun_precision": round(right / max(found, 1), 4),
        "noun_recall": round(right / max(expected, 1), 4),
        "noun_f1": round(2 * right / max(found + expected, 1), 4),
    }
    return result if own_tokens else result | {"tag_accuracy": round(tags_right / tags, 4)}


def lookups(name: str) -> Any:
    """A table of spacy-lookups-data.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec("spacy_lookups_data")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("word tables are missing: pip install spacy-lookups-data")
    path = Path(found.origin).parent / "data" / f"en_{name}.json.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def parts_of_speech(
    word: str, index: dict[str, set[str]], rules: dict[str, list[list[str]]]
) -> tuple[bool, ...]:
    """Whether a word may be a form of each of noun, verb, adjective, adverb."""
    word = word.lower()
    possible = []
    for part in ("noun", "verb", "adj", "adv"):
        forms = [word]
        for old, new in rules.get(part, ()):
            if word.endswith(old):
                forms.append(word[: len(word) - len(old)] + new)
        possible.append(any(form in index[part] for form in forms))
    return tuple(possible)


def capital(word: str, frequency: dict[str, float]) -> int:
    """How much more often a word has a capital than not: 1 to 4; 0 where it is not known."""
    without, having = frequency.get(word.lower()), frequency.get(word.capitalize())
    if without is None and having is None:
        return 0
    never = -20.0  # rarer than any word of the table
    difference = (having or never) - (without or never)
    return 1 + sum(difference > bound for bound in CAPITAL_BOUNDS)


def word_vectors() -> Vectors:
    """One vector per kind of word, with the words that belong to it as keys.

    Raises:
        ModuleNotFoundError: spacy-lookups-data is not installed.
    """
    clusters, frequency = lookups("lexeme_cluster"), lookups("lexeme_prob")
    index = {part: set(lemmas) for part, lemmas in lookups("lemma_index").items()}
    rules = lookups("lemma_rules")
    words = [word for word in frequency if any(letter.isalpha() for letter in word)]
    words.sort(key=lambda word: (-frequency[word], word))
    # Cluster 0 means that a word was too rare to be clustered.
    kind_of = {
        word: (
            clusters.get(word, 0),
            *parts_of_speech(word, index, rules),
            capital(word, frequency),
        )
        for word in words[:KNOWN_WORDS]
    }
    kinds = sorted(set(kind_of.values()))
    known = sorted({kind[0] for kind in kinds})
    # A path is stored as a number whose lowest bit is the first turn.
    parts = [np.eye(1 << bits)[[kind[0] % (1 << bits) for kind in kinds]] for bits in PREFIX_BITS]
    whole = np.random.default_rng(SEED).standard_normal((len(known), CLUSTER_DIMENSIONS))
    clustered = np.array([kind[0] != 0 for kind in kinds])[:, None]
    parts.append(whole[np.searchsorted(known, [kind[0] for kind in kinds])] / 8)
    parts = [part * clustered for part in parts]
    parts.append(np.array([kind[1:-1] for kind in kinds], float))
    parts.append(np.eye(len(CAPITAL_BOUNDS) + 2)[[kind[-1] for kind in kinds]])
    data = np.concatenate(parts, axis=1).astype(np.float32)
    vectors = Vectors(data=data, name="word_kinds")
    row_of = {kind: row for row, kind in enumerate(kinds)}
    for word, kind in kind_of.items():
        vectors.add(word, row=row_of[kind])
    return vectors


def new_pipeline(labels: list[str], vectors: Vectors) -> Language:
    """A blank English pipeline with an untrained tagger for these tags."""
    nlp = spacy.blank("en")
    nlp.vocab.vectors = vectors
    model = Config().from_str(MODEL)["model"]
    tagger = nlp.add_pipe("tagger", config={"model": model, "label_smoothing": LABEL_SMOOTHING})
    for label in labels:
        tagger.add_label(label)
    return nlp


def train(sentences: list[Sentence], dev_set: list[Sentence], epochs: int) -> tuple[Language, dict]:
    """The pipeline of the epoch that is best on the dev set, and that epoch's scores."""
    fix_random_seed(SEED)
    rng = random.Random(SEED)
    whole, phrases = training_pairs(sentences)
    labels = sorted({tag for _, tags in whole for tag in tags})
    nlp = new_pipeline(labels, word_vectors())
    nlp.initialize(lambda: [example(nlp, pair, Counter(), rng) for pair in whole[:200]])
    counts: Counter[int] = Counter()
    for words, _ in whole:
        counts.update(token.norm for token in Doc(nlp.vocab, words=words))
    optimizer = Adam(
        LEARNING_RATE, L2=0.01, grad_clip=1.0, L2_is_weight_decay=True, use_averages=True
    )
    best: dict[str, Any] = {"value": -1.0}
    began = time.monotonic()
    for epoch in range(epochs):
        done = epoch / max(epochs - 1, 1)
        optimizer.learn_rate = LEARNING_RATE + done * (LAST_LEARNING_RATE - LEARNING_RATE)
        words_per_batch = FIRST_WORDS_PER_BATCH + done * (
            LAST_WORDS_PER_BATCH - FIRST_WORDS_PER_BATCH
        )
        pairs = whole + [pair for pair in phrases if rng.random() < PHRASE_SHARE]
        rng.shuffle(pairs)
        examples = (example(nlp, augmented(pair, rng), counts, rng) for pair in pairs)
        losses: dict[str, float] = {}
        for batch in batches(examples, words_per_batch):
            nlp.update(batch, sgd=optimizer, drop=DROPOUT, losses=losses)
        with nlp.use_params(optimizer.averages):
            cased, lowered = score(nlp, dev_set), score(nlp, dev_set, lower=True)
            value = 3 * cased["noun_f1"] + lowered["noun_f1"]
            if value > best["value"]:
                best = {"value": value, "epoch": epoch, "dev": cased, "dev_lower_case": lowered}
                weights = nlp.get_pipe("tagger").to_bytes(exclude=["vocab"])
        report = {"epoch": epoch, "loss": round(losses["tagger"]), "f1": cased, "lower": lowered}
        print(f"{time.monotonic() - began:6.0f} s", json.dumps(report), flush=True)
    # Into a fresh pipeline, so that no words of the treebank are shipped in its string store (which
    # a pipeline shares with its vectors).
    trained = new_pipeline(labels, word_vectors())
    trained.get_pipe("tagger").from_bytes(weights, exclude=["vocab"])
    return trained, {name: best[name] for name in ("epoch", "dev", "dev_lower_case")}


def main() -> None:
    """Trains, scores on the test set and writes the pipeline with its notice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--treebank", required=True, help="folder with {train,dev,test}.conllu")
    parser.add_argument("--output", required=True, help="folder for the spaCy pipeline")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    train_set, dev_set, test_set = (
        read_conllu(Path(arguments.treebank) / f"{part}.conllu")
        for part in ("train", "dev", "test")
    )
    nlp, scores = train(train_set, dev_set, arguments.epochs)
    # The words of the test set stay in the copy that meets them.
    nlp.to_disk(arguments.output)
    copy = spacy.load(arguments.output)
    scores |= {
        "test": score(copy, test_set),
        "test_lower_case": score(copy, test_set, lower=True),
        "test_own_tokens": score(copy, test_set, own_tokens=True),
    }
    nlp.meta |= {
        "name": "ovref_miniature_tagger",
        "version": "1.0.0",
        "description": "Part-of-speech tagger of ovref's miniature, made by train_tagger.py",
        "license": "CC BY-SA 4.0",
        "sources": [{"name": "UD English EWT", "license": "CC BY-SA 4.0"}],
        "performance": scores,
    }
    nlp.to_disk(arguments.output)
    (Path(arguments.output) / "NOTICE.md").write_text(NOTICE, encoding="utf-8")
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
