"""Run: pytest tests/ovref/models/test_tokens.py"""

import pytest
from transformers import CLIPTokenizer

from ovref.errors import ModelError
from ovref.models.tokens import around_caption, lowered, mentions, token_positions
from ovref.records import Noun


@pytest.fixture(scope="module")
def tokenizer(tiny_pipelines):
    return CLIPTokenizer.from_pretrained(tiny_pipelines["sd1"] / "tokenizer")


def located(tokenizer, caption, *nouns):
    """Positions of nouns given as the text of their first occurrence."""
    spans = [[(caption.index(noun), caption.index(noun) + len(noun))] for noun in nouns]
    return token_positions(tokenizer, caption, spans)


def pieces(tokenizer, caption, positions):
    ids = tokenizer(caption, truncation=True)["input_ids"]
    return "".join(tokenizer.convert_ids_to_tokens([ids[p] for p in positions]))


def test_positions_count_from_the_start_token(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("a cat and a dog")["input_ids"]) == [
        "<|startoftext|>", "a</w>", "cat</w>", "and</w>", "a</w>", "dog</w>", "<|endoftext|>",
    ]  # fmt: skip
    assert located(tokenizer, "a cat and a dog", "cat", "dog") == [(2,), (5,)]


def test_a_word_of_several_tokens(tokenizer):
    caption = "a zebra and a dog"
    (zebra, dog) = located(tokenizer, caption, "zebra", "dog")
    assert zebra == (2, 3, 4, 5, 6)
    assert pieces(tokenizer, caption, zebra) == "zebra</w>"
    assert dog == (9,)


def test_a_noun_of_several_words(tokenizer):
    caption = "the dog cat runs"
    assert pieces(tokenizer, caption, located(tokenizer, caption, "dog cat")[0]) == "dog</w>cat</w>"


def test_all_occurrences_of_a_noun(tokenizer):
    assert token_positions(tokenizer, "dog and dog", [[(0, 3), (8, 11)]]) == [(1, 3)]


@pytest.mark.parametrize(
    ("caption", "noun", "found"),
    [
        ("A  CAT,\n\tand a DOG", "DOG", "dog</w>"),
        ("the dog's cat", "dog", "dog</w>"),
        ("the dog's cat", "cat", "cat</w>"),
        ("well-dog.dog", "dog", "dog</w>"),
        ("caf\u00e9 dog", "dog", "dog</w>"),
        ("cafe\u0301 dog", "dog", "dog</w>"),
        ("cafe\u0301", "cafe\u0301", "caf\u00c3\u00a9</w>"),
        ("\u0130stanbul dog", "dog", "dog</w>"),
        ("\U0001f600 dog", "dog", "dog</w>"),
        ("\u3000 dog\u00a0 cat", "cat", "cat</w>"),
        ("12dog", "dog", "dog</w>"),
    ],
    ids=ascii,
)
def test_spans_survive_the_tokenizers_clean_up(tokenizer, caption, noun, found):
    assert pieces(tokenizer, caption, located(tokenizer, caption, noun)[0]) == found


def test_a_span_inside_one_token_takes_the_token(tokenizer):
    assert token_positions(tokenizer, "cat", [[(1, 2)]]) == [(1,)]


def test_a_noun_beyond_the_context_has_no_position(tokenizer):
    caption = "cat " + "x" * 74 + " dog"  # 1 + 74 tokens fill the context of 77
    assert located(tokenizer, caption, "cat", "dog") == [(1,), ()]
    assert located(tokenizer, caption[1:], "dog") == [()]


def test_the_last_noun_that_fits(tokenizer):
    caption = "x" * 74 + " dog"
    assert located(tokenizer, caption, "dog") == [(75,)]


def test_a_noun_cut_in_two_by_the_end_of_the_context_has_no_position(tokenizer):
    caption = "x" * 73 + " zebra"
    assert located(tokenizer, caption, "zebra") == [()]


def test_only_the_occurrence_within_the_context_counts(tokenizer):
    caption = "dog " + "x" * 80 + " dog"
    assert token_positions(tokenizer, caption, [[(0, 3), (85, 88)]]) == [(1,)]


@pytest.mark.parametrize("span", [(0, 0), (3, 2), (-1, 2), (0, 4)])
def test_a_span_outside_the_caption_is_refused(tokenizer, span):
    with pytest.raises(ValueError, match="is not in a caption of 3"):
        token_positions(tokenizer, "dog", [[span]])


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(ModelError, match="fast tokenizer"):
        token_positions(object(), "dog", [[(0, 3)]])


def said(caption, *words):
    """The texts of each mention, for nouns found at the first occurrence of `words`."""
    nouns = [Noun(text=w.lower(), start=caption.index(w), end=caption.index(w) + len(w))
             for w in words]  # fmt: skip
    found = mentions(caption, nouns)
    assert list(found) == list(dict.fromkeys(noun.text for noun in nouns))
    return [[(start, caption[start:end]) for start, end in spans] for spans in found.values()]


def test_every_mention_of_a_noun_is_found():
    assert said("A dog and a Dog", "dog") == [[(2, "dog"), (12, "Dog")]]
    assert said("red bus, red bus, bus", "red bus") == [[(0, "red bus"), (9, "red bus")]]
    assert said("a dog, hotdogs, dog's dog-sled", "dog") == [[(2, "dog"), (16, "dog"), (22, "dog")]]
    assert said("(c++) c++", "c++") == [[(1, "c++"), (6, "c++")]]


def test_a_mention_inside_another_noun_is_not_one():
    assert said("a wall by a brick wall, a wall", "wall", "brick wall") == [
        [(2, "wall"), (26, "wall")],
        [(12, "brick wall")],
    ]


def test_spans_given_apart_under_one_text_belong_together():
    caption = "two dogs, one dog, no dogs"
    nouns = [Noun(text="dog", start=4, end=8), Noun(text="dog", start=14, end=17)]
    assert mentions(caption, nouns) == {"dog": [(4, 8), (14, 17), (22, 26)]}
    assert mentions(caption, []) == {}


def test_what_a_template_puts_around_the_caption_moves_its_tokens(tokenizer):
    plain = located(tokenizer, "a cat and a dog", "cat", "dog")
    spans = [[(2, 5)], [(12, 15)]]
    found = token_positions(tokenizer, "a cat and a dog", spans, before="the ", after=" dog")
    assert found == [tuple(position + 3 for position in noun) for noun in plain]  # t, h, e
    assert token_positions(tokenizer, "a cat", [[(2, 5)]], max_length=3) == [()]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_the_left_moves_all_tokens(tiny_pipelines, side):
    padding = CLIPTokenizer.from_pretrained(tiny_pipelines["sd1"] / "tokenizer", padding_side=side)
    found = token_positions(padding, "a cat", [[(2, 5)]], padding="max_length", max_length=20)
    assert found == [(2 + (16 if side == "left" else 0),)]


def test_around_a_caption():
    assert around_caption("<user>{}</user>".format) == ("<user>", "</user>")
    for changed in (str.upper, "{0}{0}".format, lambda text: "nothing of it"):
        with pytest.raises(ModelError, match="changes or repeats the caption"):
            around_caption(changed)


@pytest.mark.parametrize(
    ("caption", "noun", "text"),
    [
        ("a Cat", "Cat", "a cat"),
        ("  A Cat ", "Cat", "a cat"),
        ("\u0130stanbul's Dog", "Dog", "i\u0307stanbul's dog"),
        ("Dog", "Dog", "dog"),
    ],
    ids=ascii,
)
def test_spans_in_lower_case(caption, noun, text):
    start = caption.index(noun)
    found, (((first, last),),) = lowered(caption, [[(start, start + len(noun))]])
    assert found == text == caption.lower().strip()
    assert found[first:last] == noun.lower()
