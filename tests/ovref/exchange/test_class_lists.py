"""Class lists as people give them."""

import numpy as np
import pytest

from ovref.errors import InputError
from ovref.exchange.class_lists import read_classes


def test_words_files_and_sets_of_the_field(tmp_path):
    found = read_classes("tree, grass;lawn,sky")
    assert found.names == ("tree", "grass", "sky") and found.things is None
    assert found.query_names == ("tree", "grass", "lawn", "sky")
    labels_hw = np.array([[0, 1, 2], [3, -1, 2]], np.int32)
    assert found.labels(labels_hw).tolist() == [[0, 1, 1], [2, -1, 1]]
    assert found.missing(("lawn", "sky")) == ("sky",) and found.missing(()) == ()
    (tmp_path / "list.txt").write_text("dog;hound\n\ncat\n")
    assert read_classes(str(tmp_path / "list.txt")).query_names == ("dog", "hound", "cat")
    assert len(read_classes("ade150").names) == 150
    assert "walls" in read_classes("ade150:fcclip").query_names
    assert read_classes("coco_panoptic").things is not None
    # Words that no set is like stay classes.
    assert read_classes("boeing747").names == ("boeing747",)


def test_things():
    assert read_classes("tree,sky", "tree").things == {0}
    assert read_classes("tree,sky", "all").things == {0, 1}
    assert read_classes("tree,sky", "none").things == frozenset()


@pytest.mark.parametrize(
    ("text", "things", "message"),
    [
        (" , ", None, "expected one class or more, found none"),
        ("tree,tree", None, "two classes of 'tree,tree' have the name 'tree'"),
        ("lists/none.txt", None, "there is no class list lists/none.txt"),
        ("ade150:other", None, "ade150 has the class lists mmseg"),
        ("ade151", None, "there is no set ade151; did you mean ade150"),
        ("coco_stuf:mmseg", None, "there is no set coco_stuf; did you mean coco_stuff"),
        ("tree", "dog", "things must be classes, found dog"),
    ],
)
def test_what_is_no_class_list(text, things, message):
    with pytest.raises(InputError, match=message):
        read_classes(text, things)
