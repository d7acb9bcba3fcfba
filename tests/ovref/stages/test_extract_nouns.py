import itertools
import pickle
import subprocess
import sys

import pytest

from ovref import config
from ovref.check_models import check_models
from ovref.contract import Dropped
from ovref.errors import ConfigError, InputError, ModelError
from ovref.identity import canonical, fingerprint, record_key, spec_identity
from ovref.models.tagger import load_tagger
from ovref.ops.singular import singular
from ovref.records import Caption, Noun, Prompt, Segments
from ovref.stages import extract_nouns
from ovref.stages.extract_nouns import ExtractNouns
from scene_captions import sample_captions


def caption(text: str, **options) -> Caption:
    return Caption(key=record_key("c", text), text=text, source="c.txt:1", **options)


@pytest.fixture(scope="module")
def stage():
    return ExtractNouns().build()


def nouns(stage, text: str) -> list[str]:
    (answer,) = stage(iter([caption(text)]))
    return [noun.text for noun in answer.nouns] if isinstance(answer, Prompt) else []


def test_a_prompt_carries_the_caption_on_with_its_nouns(stage):
    record = caption("Two dogs run on the beach.", draw=3, image=b"jpeg")
    (prompt,) = stage(iter([record]))
    assert (prompt.key, prompt.caption, prompt.source) == (record.key, record.text, "c.txt:1")
    assert (prompt.draw, prompt.image) == (3, b"jpeg")
    assert [(n.text, record.text[n.start : n.end]) for n in prompt.nouns] == [
        ("dog", "dogs"),
        ("beach", "beach"),
    ]


@pytest.mark.parametrize("text", ["", ".", "12 34", "running very fast", "it is red and blue"])
def test_a_caption_without_nouns_is_dropped(stage, text):
    record = caption(text)
    assert list(stage(iter([record]))) == [Dropped(record.key, "no_nouns")]


def test_captions_in_other_languages_are_counted_drops(stage):
    records = [caption("ein Mann mit einem Hund neben einer Bank"), caption("a dog and a man")]
    first, second = stage(iter(records))
    assert first == Dropped(records[0].key, "other_language")
    assert [noun.text for noun in second.nouns] == ["dog", "man"]


def test_many_captions_in_other_languages_are_a_warning():
    assert extract_nouns.language_warning(1000, {"other_language": 50, "no_nouns": 900}) is None
    assert extract_nouns.language_warning(0, {}) is None
    message = extract_nouns.language_warning(1000, {"other_language": 51})
    assert message.startswith("warning: 51 of 1000 captions (5%) are not in English")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a man standing next to a red fire hydrant", ["man", "fire hydrant"]),
        ("three traffic lights over a street", ["traffic light", "street"]),
        ("a teddy bear on a bed", ["teddy bear", "bed"]),
        ("a woman wearing jeans and sunglasses", ["woman", "jeans", "sunglasses"]),
        ("A photo of children in front of a brick wall", ["child", "brick wall"]),
        ("A MAN RIDING A HORSE", ["man", "horse"]),
        ("A Cat Sleeping On A Bed", ["cat", "bed"]),
        ("people flying kites \u2013 caf\u00e9 \u6f22\u5b57 \U0001f600", ["person", "kite"]),
    ],
)
def test_nouns_of_common_captions(stage, text, expected):
    assert nouns(stage, text)[: len(expected)] == expected


def test_nouns_may_be_what_the_tagger_takes_for_one(stage):
    nlp, tags = load_tagger("miniature:tagger", None), ExtractNouns(source="tags").build()
    texts = [text for text, _ in sample_captions(60, seed=3)]
    texts += ["a photo of a group of dogs without a leash", "a two lane road, shades of gray"]
    for text in texts:
        tagged = {one.idx: one.lower_ for one in nlp(text) if one.tag_ in ("NN", "NNS")}
        (prompt,) = tags(iter([caption(text)]))
        found = {noun.text: tagged[noun.start] for noun in prompt.nouns}  # each is tagged
        assert all({word, singular(word)} & found.keys() for word in tagged.values())
        assert all(noun in (word, singular(word)) for noun, word in found.items())
    assert nouns(stage, texts[-2]) == ["dog"]
    assert nouns(tags, texts[-2]) == ["photo", "group", "dog", "leash"]
    assert nouns(tags, texts[-1]) == ["lane", "road", "shade", "gray"]
    own = ExtractNouns(source="tags", stop_nouns=("group",), max_nouns=2)
    assert nouns(own.build(), texts[-2]) == ["photo", "dog"]
    with pytest.raises(ValueError, match="leave out classes"):
        ExtractNouns(source="tags", classes=(("dog",),))


def test_every_caption_is_answered_once_and_in_order(stage):
    words = ["dog", "very", "cats", "of", "sky", ""]
    records = [caption(f"the {a} and {b} {i}") for i, (a, b) in enumerate(
        itertools.product(words, words)
    )] * 8  # fmt: skip
    assert len(records) > extract_nouns.CAPTIONS_PER_BATCH
    answers = list(stage(iter(records)))
    assert [answer.key for answer in answers] == [record.key for record in records]


def test_the_answer_does_not_depend_on_the_batch(stage, monkeypatch):
    texts = [text for text, _ in sample_captions(60, seed=1)]
    records = [caption(text) for text in texts]
    together = list(stage(iter(records)))
    alone = [answer for record in records for answer in stage(iter([record]))]
    monkeypatch.setattr(extract_nouns, "CAPTIONS_PER_BATCH", 7)
    assert together == alone == list(stage(iter(records)))


def test_reads_no_further_than_one_batch(stage):
    taken = itertools.count()
    endless = (caption(f"a dog {next(taken)}") for _ in itertools.repeat(None))
    answers = stage(endless)
    next(answers)
    assert next(taken) == extract_nouns.CAPTIONS_PER_BATCH


def test_a_caption_of_ten_thousand_characters_is_answered(stage):
    text = "a dog and a very big cat " * 400
    (prompt,) = stage(iter([caption(text)]))
    assert [noun.text for noun in prompt.nouns] == ["dog", "cat"]
    (answer,) = stage(iter([caption("x" * 10_000)]))
    assert answer.key == record_key("c", "x" * 10_000)


def test_memory_of_words_does_not_grow_with_the_corpus(monkeypatch):
    loaded = []
    from ovref.models import tagger

    load = tagger.load_tagger
    monkeypatch.setattr(
        tagger, "load_tagger", lambda *arguments: loaded.append(load(*arguments)) or loaded[0]
    )
    stage = ExtractNouns().build()
    list(stage(caption(f"a dog{i} on a mat") for i in range(10)))
    before = len(loaded[0].vocab.strings)
    list(stage(caption(f"a cat{i} on a mat") for i in range(1000)))
    assert len(loaded[0].vocab.strings) == before


def test_settings_reach_the_rules():
    text = "a kitchen table near London with a dog and a bird"
    plain = {"include_proper": False}
    separate = ["kitchen", "table", "dog", "bird"]
    assert nouns(ExtractNouns(compounds=False, **plain).build(), text) == separate
    assert nouns(ExtractNouns(stop_nouns=("dog",), **plain).build(), text) == [
        "kitchen table",
        "bird",
    ]
    assert nouns(ExtractNouns(max_nouns=1).build(), text) == ["kitchen table"]
    assert nouns(ExtractNouns().build(), text) == ["kitchen table", "london", "dog", "bird"]


def test_the_miniature_world_is_understood(stage):
    """The nouns of its captions, known by construction, are found with their spans."""
    found = right = expected = 0
    for text, gold in sample_captions(300, seed=0):
        (answer,) = stage(iter([caption(text)]))
        mine = {(n.text, n.start, n.end) for n in getattr(answer, "nouns", ())}
        first = {noun.lemma: (noun.lemma, noun.start, noun.end) for noun in reversed(gold)}
        truth = set(first.values())
        found, right, expected = found + len(mine), right + len(mine & truth), expected + len(truth)
    assert 2 * right / (found + expected) > 0.95


@pytest.mark.parametrize(
    ("field", "value"),
    [("tagger", ""), ("max_nouns", 0), ("stop_nouns", ("Dog",)), ("stop_nouns", ("",))],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        ExtractNouns(**{field: value})


def test_reads_from_plain_values():
    spec = config.parse(ExtractNouns, {"stop_nouns": ["dog"], "max_nouns": 3})
    assert spec == ExtractNouns(stop_nouns=("dog",), max_nouns=3)
    with pytest.raises(ConfigError, match="batch_size"):
        config.parse(ExtractNouns, {"batch_size": 3})


def test_a_tagger_that_is_not_installed_is_a_model_error():
    with pytest.raises(ModelError, match="no_such_tagger"):
        ExtractNouns(tagger="no_such_tagger").build()


def test_the_spec_is_data():
    spec = ExtractNouns(max_nouns=3)
    assert pickle.loads(pickle.dumps(spec)) == spec
    identities = [spec, ExtractNouns(), ExtractNouns(compounds=False), ExtractNouns(tagger="x")]
    assert len({fingerprint(spec_identity(identity)) for identity in identities}) == 4


def test_importing_the_spec_loads_no_heavy_library():
    code = (
        "import sys, ovref.stages.extract_nouns as stage; stage.ExtractNouns();"
        "print(*{'torch', 'spacy', 'thinc'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_labels_are_nouns_as_they_are():
    labels = (Noun(text="Mauer", start=0, end=5), Noun(text="traffic light", start=7, end=20))
    segments = Segments(nouns=((1,), (0,)), map_png=b"png")
    caption = Caption(
        key="a", text="Mauer, Traffic light", source="x", image=b"1", labels=labels,
        segments=segments,
    )  # fmt: skip
    spec = ExtractNouns(source="labels", tagger="no_such_tagger")
    bare = Caption(key="b", text="a cat", source="x")
    prompt, dropped = spec.build()(iter([caption, bare]))
    assert prompt.nouns == labels and prompt.segments == segments and prompt.image == b"1"
    assert prompt.caption == caption.text and dropped == Dropped("b", "no_nouns")
    assert check_models([spec]) == ()


def test_labels_are_not_filtered():
    with pytest.raises(ValueError, match="every label is a noun"):
        ExtractNouns(source="labels", stop_nouns=("sky",))


def test_the_source_of_nouns_is_no_news_to_earlier_builds():
    assert "source" not in canonical(ExtractNouns())
    for source in ("tags", "labels"):
        assert canonical(ExtractNouns(source=source))["source"] == source


# -- given classes ------------------------------------------------------------------------------


@pytest.fixture
def class_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("Garlic Press; garlic crusher\npetri dish\nThermomix\ntable; desk\n")
    return path


def test_given_classes_have_nouns_of_their_own(stage, class_file):
    spec = config.load(ExtractNouns, None, [f"classes={class_file}"])
    given = spec.build()
    text = "Garlic presses and a petri dish on a kitchen table beside a Thermomix and a cat"
    assert nouns(given, text) == ["garlic press", "petri dish", "table", "thermomix", "cat"]
    assert "petri dish" not in nouns(stage, text) and "garlic press" not in nouns(stage, text)
    assert nouns(given, "two garlic crushers, no desk") == ["garlic press"]
    assert nouns(given, "a dog on a red sofa") == nouns(stage, "a dog on a red sofa")


def test_captions_without_the_classes_keep_their_nouns(stage):
    records = [caption(text) for text, _ in sample_captions(100, seed=2)]
    given = ExtractNouns(classes=(("garlic press",), ("petri dish",))).build()
    assert list(given(iter(records))) == list(stage(iter(records)))


def test_the_content_of_the_file_is_the_setting(class_file):
    spec = config.load(ExtractNouns, None, [f"classes={class_file}"])
    assert spec.classes[0] == ("Garlic Press", "garlic crusher") and len(spec.classes) == 4
    assert config.parse(ExtractNouns, config.dump(spec)) == spec
    moved = class_file.rename(class_file.with_name("other.txt"))
    assert config.load(ExtractNouns, None, [f"classes={moved}"]) == spec
    moved.write_text(moved.read_text() + "cork screw\n")
    longer = config.load(ExtractNouns, None, [f"classes={moved}"])
    assert fingerprint(spec_identity(longer)) != fingerprint(spec_identity(spec))
    assert "classes" not in canonical(ExtractNouns())


def test_classes_that_are_no_list_are_refused(class_file):
    with pytest.raises(InputError, match="cannot read the class list"):
        config.load(ExtractNouns, None, [f"classes={class_file}x"])
    for wrong in (("dog", "cat"), ((),), ((" ",),)):
        with pytest.raises(ValueError, match="names of each class"):
            ExtractNouns(classes=wrong)
    with pytest.raises(ConfigError, match="classes"):
        config.load(ExtractNouns, None, ["classes=3"])
    with pytest.raises(ConfigError, match="leave out stop_nouns, classes"):
        config.load(ExtractNouns, None, [f"classes={class_file}", "source=labels"])
