"""Class lists of one's own, read from text files."""

import pytest

from ovref.class_files import list_of_file
from ovref.errors import InputError


@pytest.fixture
def own(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "own.txt"
        path.write_text(text, encoding=encoding)
        return path

    return write


def test_a_list_of_one_s_own(own):
    path = own("sky; clouds\r\npeople\n\nchest of drawers ;\n", "utf-8-sig")
    found = list_of_file(path, 3)
    assert found.classes == (("sky", "clouds"), ("people",), ("chest of drawers",))
    assert found.names == ("sky", "people", "chest of drawers")


def test_a_list_of_another_length_is_refused(own):
    with pytest.raises(InputError, match=r"own\.txt has 2 classes, the data set 3"):
        list_of_file(own("a\nb\n"), 3)


def test_names_that_differ_in_case_alone_are_refused(own):
    with pytest.raises(InputError, match="'car' twice, ignoring case: classes 1 and 3"):
        list_of_file(own("Car\nbus\ncar\n"), 3)


def test_a_list_in_another_encoding_is_refused(own):
    with pytest.raises(InputError, match="cannot read the class list"):
        list_of_file(own("caf\xe9\nbus\n", "latin-1"), 2)


def test_a_missing_file_is_refused_and_a_url_is_read(own):
    path = own("sky; clouds")
    assert list_of_file(f"file://{path}").classes == (("sky", "clouds"),)
    with pytest.raises(InputError, match=r"cannot read the class list .*nothing\.txt"):
        list_of_file(path.with_name("nothing.txt"))
    with pytest.raises(InputError, match="cannot read the class list"):
        list_of_file("nowhere://list.txt")
