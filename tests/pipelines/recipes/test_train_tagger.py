import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import spacy
from spacy.language import Language
from spacy.tokens import Doc
from spacy.vectors import Vectors
from thinc.api import fix_random_seed

from ovref.models.tagger import load_tagger
from recipes.miniature import train_tagger
from recipes.miniature.train_tagger import (
    adopt,
    augmented,
    example,
    new_pipeline,
    score,
    train,
    training_phrases,
    word_vectors,
)
from recipes.miniature.treebank import noun_phrases, read_conllu

EWT = Path(__file__).parents[4] / "shared" / "data" / "ud_english_ewt"

CONLLU = """# text = The dog's owners cannot see someone.
1\tThe\tthe\tDET\tDT\t_\t2\tdet\t_\t_
2\tdog\tdog\tNOUN\tNN\tNumber=Sing\t4\tnmod\t_\tSpaceAfter=No
3\t's\t's\tPART\tPOS\t_\t2\tcase\t_\t_
4\towners\towner\tNOUN\tNNS\tNumber=Plur\t7\tnsubj\t_\t_
5-6\tcannot\t_\t_\t_\t_\t_\t_\t_\t_
5\tcan\tcan\tAUX\tMD\t_\t7\taux\t_\t_
6\tnot\tnot\tPART\tRB\t_\t7\tadvmod\t_\t_
7\tsee\tsee\tVERB\tVB\t_\t0\troot\t_\t_
7.1\tghost\tghost\tNOUN\tNN\t_\t_\t_\t_\t_
8\tsomeone\tsomeone\tPRON\tNN\tNumber=Sing\t7\tobj\t_\tSpaceAfter=No
9\t.\t.\tPUNCT\t.\t_\t7\tpunct\t_\t_

# text = other text than its words
1\tBroken\tbroken\tADJ\tJJ\t_\t0\troot\t_\t_
"""


PHRASE = (["The", "Dog", "ran", "."], ["DT", "NN", "VBD", "."], [True, True, False, False])


@pytest.fixture
def treebank(tmp_path):
    path = tmp_path / "x.conllu"
    path.write_text(CONLLU)
    return path


def test_the_bundled_tagger_is_as_good_as_it_says():
    if not EWT.exists():
        pytest.skip(f"no treebank at {EWT}")
    nlp = load_tagger()
    recorded = nlp.meta["performance"]["test"]["noun_f1"]
    sentences = read_conllu(EWT / "test.conllu")[:600]
    assert abs(score(nlp, sentences)["noun_f1"] - recorded) < 0.02


def test_the_treebank_is_read_with_its_altered_tags(treebank):
    (sentence,) = read_conllu(treebank)
    assert [(token.word, token.tag) for token in sentence.tokens] == [
        ("The", "DT"),
        ("dog", "NN"),
        ("'s", "POS"),
        ("owners", "NNS"),
        ("can", "MD"),
        ("not", "RB"),
        ("see", "VB"),
        ("someone", "PRP"),
        (".", "."),
    ]
    for token in sentence.tokens:
        assert sentence.text[token.start :].startswith(token.word)
    assert [token.word for token in sentence.tokens if not token.space] == [
        "dog",
        "can",
        "someone",
        ".",
    ]
    assert [token.word for token in sentence.tokens if token.noun] == ["dog", "owners"]


def test_noun_phrases_are_whole_subtrees(treebank):
    (sentence,) = read_conllu(treebank)
    assert noun_phrases(sentence) == [(0, 3), (0, 4)]
    whole, phrases = training_phrases([sentence])
    assert len(whole) == 1
    assert phrases[1] == (
        ["The", "dog", "'s", "owners"],
        ["DT", "NN", "POS", "NNS"],
        [True, False, True, True],
    )


def start_pipeline(*known: str) -> Language:
    """In place of `en_core_web_md`, which is a package of its own: two vectors, little else."""
    nlp = spacy.blank("en")
    nlp.vocab.vectors = Vectors(data=np.eye(3, 5, dtype=np.float32), name="three")
    for index, word in enumerate(known):
        nlp.vocab.vectors.add(word, row=index % 2)
    embed = {
        "@architectures": "spacy.MultiHashEmbed.v2",
        "width": 32,
        "attrs": ["NORM", "SUFFIX", "SHAPE", "SPACY"],
        "rows": [500, 300, 100, 10],
        "include_static_vectors": True,
    }
    encode = {
        "@architectures": "spacy.MaxoutWindowEncoder.v2",
        "width": 32,
        "depth": 2,
        "window_size": 1,
        "maxout_pieces": 2,
    }
    tok2vec = {"@architectures": "spacy.Tok2Vec.v2", "embed": embed, "encode": encode}
    listener = {"@architectures": "spacy.Tok2VecListener.v1", "width": 32}
    nlp.add_pipe("tok2vec", config={"model": tok2vec})
    tagger = {"@architectures": "spacy.Tagger.v2", "tok2vec": listener}
    nlp.add_pipe("tagger", config={"model": tagger})
    for label in ("XX", "NN", "DT"):
        nlp.get_pipe("tagger").add_label(label)
    fix_random_seed(3)
    nlp.initialize(lambda: [example(nlp, PHRASE, Counter({"dog": 1}), random.Random(1))])
    for layer in nlp.get_pipe("tagger").model.walk():
        if layer.name == "softmax":  # zero before training, which would hide a slip
            shape = layer.get_param("W").shape
            layer.set_param("W", np.random.default_rng(3).normal(size=shape).astype(np.float32))
    return nlp


def test_frequent_words_keep_their_projected_vectors():
    start = start_pipeline("dog", "cat", "bird", "fish")
    vectors, matrix = word_vectors(start, ["fish", "nowhere", "bird", "dog"])
    assert len(vectors.data) == 2  # fish has one row, bird and dog share another
    static = [n for n in start.get_pipe("tok2vec").model.walk() if n.name == "static_vectors"]
    projection = static[0].get_param("W")
    for word in ("fish", "bird", "dog"):
        expected = projection @ start.vocab.vectors[word]
        np.testing.assert_allclose(matrix @ vectors[word], expected, atol=1e-5)
    assert "nowhere" not in vectors and "cat" not in vectors


def test_training_begins_as_the_start_ends():
    words = ["the", "dog", "saw", "fish"]
    start = start_pipeline(*words)
    vectors, matrix = word_vectors(start, words)
    nlp = new_pipeline(start, ["DT", "JJ", "NN"], vectors)
    nlp.initialize(lambda: [example(nlp, PHRASE, Counter({"dog": 1}), random.Random(1))])
    adopt(nlp, start, matrix)
    docs = [Doc(pipeline.vocab, words=words) for pipeline in (nlp, start)]
    tok2vec = nlp.get_pipe("tagger").model.get_ref("tok2vec")
    (mine,), (theirs,) = (
        tok2vec.predict(docs[:1]),
        start.get_pipe("tok2vec").model.predict(docs[1:]),
    )
    np.testing.assert_allclose(mine, theirs, atol=1e-5)
    mine = nlp.get_pipe("tagger").model.predict(docs[:1])[0]
    theirs = start.get_pipe("tagger").model.predict(start.get_pipe("tok2vec").pipe(docs[1:]))
    ratios = mine[:, [2, 0]] / next(iter(theirs))[:, [1, 2]]  # shares among NN and DT
    np.testing.assert_allclose(ratios[:, 0], ratios[:, 1], rtol=1e-3)


class _Always:
    def __init__(self, value: float):
        self.value = value

    def random(self) -> float:
        return self.value


def test_augmentation_keeps_words_and_tags_together():
    assert augmented(PHRASE, _Always(0.99)) == PHRASE
    assert augmented(PHRASE, _Always(0.0)) == (
        ["the", "dog", "ran"],
        ["DT", "NN", "VBD"],
        [True, True, False],
    )
    named = (["Rex", "ran"], ["NNP", "VBD"], [True, False])
    between = (train_tagger.LOWER_SHARE + train_tagger.LOWER_SHARE_WITH_NAMES) / 2
    assert augmented(named, _Always(between)) == named


def test_scores_count_by_span(treebank):
    sentences = read_conllu(treebank)
    nlp = load_tagger()
    result = score(nlp, sentences)
    assert result == {
        "noun_precision": 1.0,
        "noun_recall": 1.0,
        "noun_f1": 1.0,
        "tag_accuracy": 1.0,
    }
    assert score(nlp, sentences, own_tokens=True)["noun_f1"] == 1.0


def test_training_learns_and_is_repeatable(treebank, monkeypatch):
    monkeypatch.setattr(train_tagger, "LEARNING_RATE", 0.01)  # one sentence makes few steps
    monkeypatch.setattr(train_tagger, "FIRST_WORDS_PER_BATCH", 30)
    words = ["dog", "owners", "see"]
    start = start_pipeline(*words)
    sentences = read_conllu(treebank) * 20
    runs = []
    for _ in range(2):
        nlp, scores = train(sentences, sentences[:1], 5, start, words)
        runs.append((nlp.get_pipe("tagger").to_bytes(exclude=["vocab"]), scores))
        assert "someone" not in nlp.vocab.strings  # no words of the treebank are shipped
    assert runs[0] == runs[1]
    assert runs[0][1]["dev"]["noun_f1"] == 1.0
