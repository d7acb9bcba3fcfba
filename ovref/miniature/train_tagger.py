"""Trains the miniature's noun tagger on the Universal Dependencies English Web Treebank.

    python -m ovref.miniature.train_tagger --treebank DIR --output DIR

DIR holds `train.conllu`, `dev.conllu` and `test.conllu` of the official split. The tagger predicts
Penn Treebank tags, with two changes that make `NN`/`NNS` mean exactly "common noun": every token
whose universal tag is NOUN is `NN` or `NNS` by its number, and no other token is (`someone`, tagged
NN in the treebank, becomes PRP). Captions are mostly noun phrases without a final full stop and
often without capitals, so besides the treebank's sentences the tagger sees noun phrases cut out of
their dependency trees, and copies of both in lower case and without final punctuation. Rare words
get a random identity now and then (word dropout), so that unknown words are read by their suffix,
shape and context. The dev set chooses the epoch; the test set is only reported.
"""

import argparse
import json
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import spacy
from spacy.tokens import Doc
from spacy.training import Example
from thinc.api import Adam, fix_random_seed

from ovref.ops.nouns import NOUN_TAGS

MODEL = """
[model]
@architectures = "spacy.Tagger.v2"

[model.tok2vec]
@architectures = "spacy.Tok2Vec.v2"

[model.tok2vec.embed]
@architectures = "spacy.MultiHashEmbed.v2"
width = 96
attrs = ["NORM", "PREFIX", "SUFFIX", "SHAPE"]
rows = [5000, 1000, 2500, 1500]
include_static_vectors = false

[model.tok2vec.encode]
@architectures = "spacy.MaxoutWindowEncoder.v2"
width = 96
depth = 4
window_size = 1
maxout_pieces = 3
"""

SEED = 7
DROPOUT = 0.2
LEARNING_RATE = 0.001
WORDS_PER_BATCH = (300, 1500)
"""Grows from the first to the second over the first `GROWTH_EPOCHS` epochs."""
GROWTH_EPOCHS = 6
WORD_DROPOUT = 0.4
"""A word seen n times in training loses its identity with probability a / (a + n)."""
LOWER_SHARE = 0.35
"""Of the examples that are put in lower case."""
NO_STOP_SHARE = 0.5
"""Of the examples that lose their final punctuation."""
PHRASE_WORDS = (3, 16)
"""Words of the noun phrases that are cut out of the trees."""


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


@dataclass(frozen=True)
class Sentence:
    """One sentence of the treebank, as written and as annotated."""

    text: str
    tokens: tuple[Token, ...]


def read_conllu(path):
    """The sentences of a CoNLL-U file whose words can be found in their text."""
    sentences, text, rows = [], "", []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith("# text = "):
            text = line.removeprefix("# text = ")
        elif line and not line.startswith("#"):
            cells = line.split("\t")
            if cells[0].isdigit():
                rows.append(cells)
        elif not line and rows:
            sentences.append(_sentence(text, rows))
            rows = []
    return [sentence for sentence in sentences if sentence is not None]


def _sentence(text, rows):
    tokens, position = [], 0
    for cells in rows:
        start = text.find(cells[1], position)
        if start < 0:
            return None
        position = start + len(cells[1])
        upos, xpos, features = cells[3], cells[4], cells[5]
        noun = upos == "NOUN"
        tokens.append(
            Token(cells[1], _tag(noun, xpos, features), int(cells[6]) - 1, start, noun)
        )
    return Sentence(text, tuple(tokens))


def _tag(noun, xpos, features):
    if noun:
        return "NNS" if xpos == "NNS" or "Number=Plur" in features else "NN"
    return "PRP" if xpos in NOUN_TAGS else xpos


def noun_phrases(sentence):
    """Spans (first, last + 1) of tokens that are the whole subtree of one common noun."""
    children = {}
    for index, token in enumerate(sentence.tokens):
        children.setdefault(token.head, []).append(index)
    spans = []
    for index, token in enumerate(sentence.tokens):
        if token.noun:
            subtree, todo = [], [index]
            while todo:
                node = todo.pop()
                subtree.append(node)
                todo.extend(children.get(node, ()))
            first, last = min(subtree), max(subtree)
            if sentence.tokens[first].tag in ("IN", "TO", "CC", ",", "POS"):
                subtree.remove(first)
                first += 1
            low, high = PHRASE_WORDS
            if last + 1 - first == len(subtree) and low <= len(subtree) <= high:
                spans.append((first, last + 1))
    return spans


def training_pairs(sentences):
    """(words, tags) of every sentence and, once each, of its noun phrases."""
    pairs = []
    for sentence in sentences:
        words = [token.word for token in sentence.tokens]
        tags = [token.tag for token in sentence.tokens]
        pairs.append((words, tags))
        pairs += [(words[a:b], tags[a:b]) for a, b in noun_phrases(sentence) if b - a < len(words)]
    return pairs


def augmented(pair, random_source):
    """The pair, perhaps in lower case, perhaps without its final punctuation."""
    words, tags = pair
    if len(words) > 2 and tags[-1] in (".", ",", ":") and random_source.random() < NO_STOP_SHARE:
        words, tags = words[:-1], tags[:-1]
    if random_source.random() < LOWER_SHARE:
        words = [word.lower() for word in words]
    return words, tags


def example(vocab, pair, counts, random_source):
    """A spaCy Example whose rare words have now and then lost their identity."""
    words, tags = pair
    doc = Doc(vocab, words=words)
    for token in doc:
        rarity = WORD_DROPOUT / (WORD_DROPOUT + counts[token.norm])
        if random_source.random() < rarity:
            token.norm_ = f"?{random_source.randrange(2000)}"
    return Example(doc, Doc(vocab, words=words, tags=tags))


def batches(examples, words_per_batch):
    batch, words = [], 0
    for item in examples:
        batch.append(item)
        words += len(item.predicted)
        if words >= words_per_batch:
            yield batch
            batch, words = [], 0
    if batch:
        yield batch


def score(nlp, sentences, *, own_tokens=False, lower=False):
    """Tag accuracy (gold tokens only) and precision, recall and F1 of common nouns.

    With `own_tokens` spaCy splits the text itself, and a noun counts as found only where the
    characters [start, end) agree.
    """
    found = right = expected = tags_right = tags = 0
    texts = [s.text.lower() if lower else s.text for s in sentences]
    if own_tokens:
        docs = nlp.pipe(texts, batch_size=256)
    else:
        words = [[t.word.lower() if lower else t.word for t in s.tokens] for s in sentences]
        docs = nlp.pipe([Doc(nlp.vocab, words=w) for w in words], batch_size=256)
    for sentence, doc in zip(sentences, docs, strict=True):
        gold = {(t.start, t.start + len(t.word)) for t in sentence.tokens if t.noun}
        if own_tokens:
            spans = [(t.idx, t.idx + len(t)) for t in doc]
        else:
            spans = [(t.start, t.start + len(t.word)) for t in sentence.tokens]
            tags_right += sum(a.tag_ == b.tag for a, b in zip(doc, sentence.tokens, strict=True))
            tags += len(doc)
        mine = {
            span for span, token in zip(spans, doc, strict=True) if token.tag_ in NOUN_TAGS
        }
        found, right, expected = found + len(mine), right + len(mine & gold), expected + len(gold)
    precision, recall = right / max(found, 1), right / max(expected, 1)
    result = {
        "noun_precision": round(precision, 4),
        "noun_recall": round(recall, 4),
        "noun_f1": round(2 * right / max(found + expected, 1), 4),
    }
    if not own_tokens:
        result["tag_accuracy"] = round(tags_right / tags, 4)
    return result


def train(treebank, output, epochs, minutes):
    """Trains, keeps the epoch that is best on dev, writes it to `output`; returns the scores."""
    fix_random_seed(SEED)
    random_source = random.Random(SEED)
    train_set, dev_set, test_set = (
        read_conllu(Path(treebank) / f"{part}.conllu") for part in ("train", "dev", "test")
    )
    pairs = training_pairs(train_set)
    nlp = spacy.blank("en")
    config = spacy.util.load_config_from_str(MODEL)
    tagger = nlp.add_pipe("tagger", config={"model": config["model"]})
    for tag in sorted({tag for _, tags in pairs for tag in tags}):
        tagger.add_label(tag)
    sample = [example(nlp.vocab, pair, Counter(), random.Random(0)) for pair in pairs[:200]]
    nlp.initialize(lambda: sample)
    norms = Counter()
    for sentence in train_set:
        norms.update(token.norm for token in Doc(nlp.vocab, [t.word for t in sentence.tokens]))
    optimizer = Adam(
        LEARNING_RATE, beta1=0.9, beta2=0.999, eps=1e-8, L2=0.01, grad_clip=1.0,
        L2_is_weight_decay=True, use_averages=True,
    )
    low, high = WORDS_PER_BATCH
    best, history, began = 0.0, [], time.monotonic()
    for epoch in range(epochs):
        optimizer.learn_rate = LEARNING_RATE * (1 - 0.9 * epoch / epochs)
        words_per_batch = low + (high - low) * min(epoch / GROWTH_EPOCHS, 1)
        random_source.shuffle(pairs)
        examples = (
            example(nlp.vocab, augmented(pair, random_source), norms, random_source)
            for pair in pairs
        )
        losses = {}
        for batch in batches(examples, words_per_batch):
            nlp.update(batch, sgd=optimizer, drop=DROPOUT, losses=losses)
        with nlp.use_params(optimizer.averages):
            cased, lowered = score(nlp, dev_set), score(nlp, dev_set, lower=True)
            value = cased["noun_f1"] + lowered["noun_f1"]
            if value > best:
                best = value
                nlp.to_disk(output)
        history.append({"epoch": epoch, "loss": round(losses["tagger"]), "dev": cased,
                        "dev_lower_case": lowered, "kept": value == best})
        print(f"{time.monotonic() - began:6.0f} s", json.dumps(history[-1]), flush=True)
        if time.monotonic() - began > 60 * minutes:
            break
    nlp = spacy.load(output)
    return {
        "dev": score(nlp, dev_set),
        "test": score(nlp, test_set),
        "test_lower_case": score(nlp, test_set, lower=True),
        "test_own_tokens": score(nlp, test_set, own_tokens=True),
        "epochs": history,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--treebank", required=True, help="folder with {train,dev,test}.conllu")
    parser.add_argument("--output", required=True, help="folder for the spaCy pipeline")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this long")
    arguments = parser.parse_args()
    scores = train(
        arguments.treebank, arguments.output, arguments.epochs, arguments.minutes
    )
    print(json.dumps({name: value for name, value in scores.items() if name != "epochs"}, indent=1))


if __name__ == "__main__":
    main()
