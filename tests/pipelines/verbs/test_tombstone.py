"""`ovref tombstone`: delete, list, dry run, undo."""

import json
from argparse import Namespace

import pytest
import small_build

from ovref.errors import InputError
from ovref.storage.file_store import Store
from ovref_inference import ReferenceCollection
from ovref_pipelines import commands
from ovref_pipelines.verbs import tombstone


@pytest.fixture
def place(tmp_path):
    small_build.build(Store.open(str(tmp_path / "out")), tmp_path / "work")
    return str(tmp_path / "out" / "collection")


class Shown:
    def __init__(self):
        self.texts = []

    def show(self, text):
        self.texts.append(text)


def run(place, **options):
    defaults = {
        "collection": place, "key": [], "source": [], "noun": [], "ids": None, "reason": None,
        "list": False, "undo": False, "dry_run": False, "json": False,
    }  # fmt: skip
    shown = Shown()
    assert commands.VERBS["tombstone"](Namespace(**defaults | options), shown) == 0
    return "\n".join(shown.texts)


def living(place):
    with ReferenceCollection.open(place) as collection:
        return len(collection)


def test_numbers_of_a_file_are_deleted_listed_and_taken_back(place, tmp_path):
    numbers = tmp_path / "numbers.txt"
    numbers.write_text("1, 3\n3 4\n")
    total = living(place)
    would = run(place, ids=str(numbers), dry_run=True)
    assert would == "3 references would be deleted: 3 cup" and living(place) == total
    assert run(place, ids=str(numbers), reason="blurred").startswith("3 references deleted")
    assert living(place) == total - 3
    numbers.write_text("0 1")
    assert run(place, ids=str(numbers), reason="again").startswith("1 references deleted")
    assert run(place, list=True).splitlines() == [
        f"4 references of {place} are deleted", "  3 because of: blurred", "  1 because of: again",
        "1\tblurred", "3\tblurred", "4\tblurred", "0\tagain",
    ]  # fmt: skip
    assert json.loads(run(place, list=True, json=True))[3] == {"id": 0, "reason": "again"}
    assert run(place, ids=str(numbers), undo=True, dry_run=True).startswith("2 deletions would")
    assert run(place, ids=str(numbers), undo=True) == "2 deletions undone"
    assert run(place, noun=["cup"], undo=True) == "2 deletions undone"
    assert living(place) == total


def test_a_reason_is_one_line_and_a_noun_in_lower_case(place):
    run(place, noun=["  CUP "], reason="a wrong\n\tmask ")
    listed = run(place, list=True).splitlines()
    assert listed[1].endswith("because of: a wrong mask") and listed[2].endswith("\ta wrong mask")


def test_nothing_is_deleted_that_was_not_named_or_without_a_reason(place, tmp_path):
    for options, says in (
        ({"noun": ["cup"]}, "give --reason"),
        ({"noun": ["cup"], "reason": " \n"}, "give --reason"),
        ({"reason": "x"}, "select references"),
        ({"reason": "x", "noun": ["zebra"]}, "has no reference of the nouns: zebra"),
        ({"undo": True, "noun": ["cup"]}, "has no deleted reference of the nouns: cup"),
    ):
        with pytest.raises(InputError, match=says):
            run(place, **options)
    numbers = tmp_path / "numbers.txt"
    for text, says in (
        ("1 two", "found 'two'"), (" ,\n", "holds no number"), ("999", "no references \\[999\\]"),
        ("9" * 30, "found '9999"),
    ):  # fmt: skip
        numbers.write_text(text)
        with pytest.raises(InputError, match=says):
            run(place, ids=str(numbers), reason="x")
    with pytest.raises(InputError, match="cannot read"):
        tombstone.read_ids(str(tmp_path / "none.txt"))
