import io
import json
import random

import pytest

from ovref.corpora import json_stream
from ovref.corpora.json_stream import stream_items


def items(text: str, wanted: str) -> list:
    return [value for _, value in stream_items(io.StringIO(text), wanted)]


def random_value(rng: random.Random, depth: int = 0):
    kinds = [
        lambda: rng.randrange(-(10**6), 10**6),
        lambda: rng.random() * 1e-5,
        lambda: rng.choice([True, False, None]),
        lambda: "".join(rng.choice('abc "\\/é漢\n{}[],:') for _ in range(rng.randrange(30))),
    ]
    if depth < 3:
        kinds += [
            lambda: [random_value(rng, depth + 1) for _ in range(rng.randrange(4))],
            lambda: {str(i): random_value(rng, depth + 1) for i in range(rng.randrange(4))},
        ]
    return rng.choice(kinds)()


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_agrees_with_the_whole_decoder_whatever_the_block_size(monkeypatch, block):
    monkeypatch.setattr(json_stream, "FIRST_READ", block)
    rng = random.Random(block)
    for _ in range(30):
        tree = {
            "info": random_value(rng),
            "images": [random_value(rng) for _ in range(rng.randrange(5))],
            "annotations": [random_value(rng) for _ in range(rng.randrange(8))],
            "last": random_value(rng),
        }
        text = json.dumps(tree, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
        assert items(text, "annotations") == tree["annotations"]
        assert items(text, "images") == tree["images"]
        both = [(name, value) for name in ("images", "annotations") for value in tree[name]]
        assert list(stream_items(io.StringIO(text), "annotations", "images")) == both


@pytest.mark.parametrize("block", [1, 65536])
def test_numbers_cut_by_the_block_are_read_whole(monkeypatch, block):
    monkeypatch.setattr(json_stream, "FIRST_READ", block)
    assert items('{"annotations": [123, 45.5, -6e3, true]}', "annotations") == [
        123,
        45.5,
        -6000.0,
        True,
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty file"),
        (" {} ", "expected the member `annotations`, found none"),
        ('{"info": {}, "images": []}', "expected the member `annotations`, found info, images"),
        ("[1, 2]", "expected a JSON object"),
        ("not json", "expected a JSON object"),
        ('{"annotations": [1, 2', "expected ',', found 'the end'"),
        ('{"annotations": [1, 2 3]}', "expected ','"),
        ('{"annotations": [{"a": }]}', "broken or cut-off JSON"),
        ('{"annotations": ["abc', "broken or cut-off JSON"),
        ('{"annotations": {"a": 1}}', "expected annotations to be an array"),
        ("{1: 2}", "expected a member name"),
        ('{"annotations" [1]}', "expected ':'"),
    ],
)
def test_what_is_not_such_an_object_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        list(stream_items(io.StringIO(text), "annotations"))


def test_memory_does_not_grow_with_the_array(monkeypatch):
    """The text kept is about one value and one block, however long the file."""
    longest = 0
    original = json_stream._Window._more

    def watched(window, characters):
        nonlocal longest
        original(window, characters)
        longest = max(longest, len(window._text))

    monkeypatch.setattr(json_stream, "FIRST_READ", 1000)
    monkeypatch.setattr(json_stream._Window, "_more", watched)
    text = json.dumps({"annotations": [{"caption": "x" * 100}] * 5000})
    assert len(items(text, "annotations")) == 5000
    assert 1000 <= longest < 4000
