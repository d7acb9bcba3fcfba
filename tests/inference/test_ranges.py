"""Run: pytest tests/inference/test_ranges.py"""

import pytest

from ovref_inference.ranges import (
    require_above,
    require_at_least,
    require_each_at_least,
    require_within,
)

NAN = float("nan")


@pytest.mark.parametrize("value", [1, 1.0, 7])
def test_at_least(value):
    require_at_least("k", value, 1)


@pytest.mark.parametrize("value", [0, -1, NAN, None])
def test_below_the_least(value):
    with pytest.raises(ValueError, match=f"k must be at least 1, found {value}"):
        require_at_least("k", value, 1)


@pytest.mark.parametrize("value", [0, NAN, None])
def test_above(value):
    require_above("scale", 0.1, 0)
    with pytest.raises(ValueError, match="scale must be above 0, found"):
        require_above("scale", value, 0)


@pytest.mark.parametrize(
    ("ends", "inside", "outside"),
    [
        ("[]", [0, 1], [-0.1, 1.1, NAN, None]),
        ("(]", [0.1, 1], [0, 1.1, NAN]),
        ("[)", [0, 0.9], [1, NAN]),
        ("()", [0.5], [0, 1]),
    ],
)
def test_within(ends, inside, outside):
    for value in inside:
        require_within("share", value, 0, 1, ends)
    for value in outside:
        with pytest.raises(ValueError, match=r"share must be in .0, 1., found"):
            require_within("share", value, 0, 1, ends)


def test_each():
    require_each_at_least("factors", (1, 2), 1)
    for values in [(), (1, 0), (NAN,)]:
        with pytest.raises(ValueError, match="factors must be one or more values of at least 1"):
            require_each_at_least("factors", values, 1)
