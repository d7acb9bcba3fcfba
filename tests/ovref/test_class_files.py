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
    with pytest.raises(InputError, match=r"cannot read the class list .* save it as UTF-8"):
        list_of_file(own("caf\xe9\nbus\n", "latin-1"), 2)


def test_a_missing_file_is_refused_and_a_url_is_read(own):
    path = own("sky; clouds")
    assert list_of_file(f"file://{path}").classes == (("sky", "clouds"),)
    with pytest.raises(InputError, match=r"cannot read the class list .*nothing\.txt"):
        list_of_file(path.with_name("nothing.txt"))
    with pytest.raises(InputError, match="cannot read the class list"):
        list_of_file("nowhere://list.txt")


def test_names_that_differ_in_unicode_s_forms_alone_are_refused(own):
    with pytest.raises(InputError, match="twice, ignoring case: classes 1 and 2"):
        list_of_file(own("caf\u00e9\ncafe\u0301\n"))


def test_a_class_without_a_name_of_its_own_is_refused(own):
    with pytest.raises(InputError, match=r"all names of class 2, 'Lawn', .*\('grass'\)"):
        list_of_file(own("grass; lawn\nLawn\n"))
    shared = list_of_file(own("grass; green\ntree; green\n"))
    assert shared.query_names() == (("grass", "green", "tree"), (0, 0, 1))


@pytest.mark.parametrize("text", ["0: sky\n1: grass\n", "1,sky\n2,grass\n", "0;sky\n\n1 ;grass"])
def test_numbers_before_names_are_refused(own, text):
    with pytest.raises(InputError, match="numbers its classes"):
        list_of_file(own(text))
    assert list_of_file(own("3d printer\n7 up; soda\n")).names == ("3d printer", "7 up")
