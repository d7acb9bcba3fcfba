import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest

from ovref.identity import (
    ADDED_LATER,
    canonical,
    fingerprint,
    normalised,
    record_key,
    record_seed,
    spec_identity,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    size_hw: tuple[int, int] = (64, 48)


@dataclass(frozen=True, kw_only=True)
class Spec:
    name: ClassVar[str] = "embed"
    version: ClassVar[int] = 2
    model: str = "miniature:clip"
    inner: Inner = Inner()
    threshold: float = 0.45


VALUE = {"b": [1, 2.5, None, True], "a": {"ä": "Käse"}}


def test_the_values_of_identity_never_change():
    """If this fails, everything that was ever built has to be built again."""
    assert record_key("coco", "A cat on a mat.") == "e9c60d90f000e5861b492b05"
    assert record_key("coco", "A cat on a mat.", draw=1) == "4e79ad6c23a63bedd5271af9"
    assert record_key("ä", "Käse 🧀") == "1afbbb4c72adc59543feddb8"
    assert record_seed(0, "e9c60d90f000e5861b492b05") == 3731860295404455459
    assert record_seed(7, "e9c60d90f000e5861b492b05") == 8701746930673400971
    assert fingerprint(VALUE) == (
        "9fdc3212b56fa2dc637ec2b6239c80f294b792281a7e64341c787cf81f04e80a"
    )


def test_identity_is_the_hash_that_its_docstrings_say():
    text = '{"a":{"ä":"Käse"},"b":[1,2.5,null,true]}'
    assert fingerprint(VALUE) == hashlib.sha256(text.encode()).hexdigest()
    digest = hashlib.sha256('["coco","Käse",0]'.encode()).hexdigest()
    assert record_key("coco", "Käse") == digest[:24]
    digest = hashlib.sha256(b'[5,"k"]').digest()
    assert record_seed(5, "k") == int.from_bytes(digest[:8], "big") // 2


@pytest.mark.parametrize(
    "other", [" A  cat\ton a mat.\n", "A cat\u00a0on a mat.", "A cat\r\non\u2003a mat."]
)
def test_white_space_makes_no_other_caption(other):
    assert record_key("coco", other) == record_key("coco", "A cat on a mat.")


def test_the_unicode_form_makes_no_other_caption():
    assert record_key("coco", "Ka\u0308se") == record_key("coco", "K\u00e4se")
    assert normalised(" Ka\u0308se ") == "K\u00e4se"
    assert normalised("\ufeffa sail\u00adboat\u200b \u200b at sea") == "a sailboat at sea"
    assert normalised("\U0001f468\u200d\U0001f467") == "\U0001f468\u200d\U0001f467"  # one emoji
    assert normalised("\ufb01sh \u00b2") == "\ufb01sh \u00b2"  # other characters, not other forms
    assert normalised(" \n") == ""


def test_everything_else_makes_another_key():
    keys = {
        record_key("coco", "a cat"),
        record_key("coco", "A cat"),
        record_key("coco", "a cat."),
        record_key("coco", "acat"),
        record_key("coco", "a cat", draw=1),
        record_key("coco", "a cat", image="00ff"),
        record_key("coco", "a cat", image="00fe"),
        record_key("coco2", "a cat"),
        record_key("cococ", "a at"),
        record_key("", "cocoa cat"),
    }
    assert len(keys) == 10


def test_half_a_surrogate_pair_has_a_key():
    assert record_key("coco", "\ud800") != record_key("coco", "\udfff")


def test_seeds_fit_a_generator_and_differ():
    seeds = [record_seed(seed, f"{n:024x}") for seed in range(3) for n in range(100)]
    assert len(set(seeds)) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62 > min(seeds)


def test_identity_does_not_hang_on_the_process():
    """Python's own hashes differ from process to process."""
    program = (
        "from ovref.identity import fingerprint, record_key;"
        "print(record_key('coco', 'a cat'), fingerprint({c: c for c in 'hgfedcba'}))"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1


# -- fingerprints ----------------------------------------------------------------------------------


def test_the_order_of_keys_does_not_matter_and_that_of_lists_does():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])
    assert fingerprint((1, 2)) == fingerprint([1, 2])


def test_values_of_other_types_are_other_values():
    values = [0, 0.0, False, None, "0", "", [], {}, [0], "None", 1, True]
    assert len({fingerprint(value) for value in values}) == len(values)


def test_a_dataclass_counts_by_its_fields():
    assert fingerprint(Spec()) == fingerprint(Spec(inner=Inner(size_hw=(64, 48))))
    assert fingerprint(Spec()) != fingerprint(Spec(inner=Inner(size_hw=(48, 64))))
    assert spec_identity(Spec()) == {
        "name": "embed",
        "version": 2,
        "fields": {"model": "miniature:clip", "inner": {"size_hw": [64, 48]}, "threshold": 0.45},
    }


def test_a_canonical_value_survives_json_and_is_its_own_canonical_value():
    value = canonical({"spec": Spec(), "values": (1, 2.5, None, "ä", 1e-300, 2**70)})
    assert json.loads(json.dumps(value)) == value
    assert canonical(value) == value
    assert fingerprint(json.loads(json.dumps(value))) == fingerprint(value)


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        b"bytes",
        np.zeros(2),
        np.float32(1),
        lambda: None,
        Spec,
        {1: 2},
        object(),
        [{"deep": {"in": {3}}}],
    ],
)
def test_what_has_no_canonical_form_is_refused(value):
    with pytest.raises(TypeError, match="has no canonical form to fingerprint"):
        fingerprint(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [-float("inf")]])
def test_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="a fingerprint needs finite numbers, found"):
        fingerprint(value)


def test_a_field_added_later_counts_only_away_from_its_default():
    @dataclass(frozen=True)
    class Before:
        size: int = 3

    @dataclass(frozen=True)
    class After:
        size: int = 3
        masks: int = field(default=2, metadata=ADDED_LATER)

    assert fingerprint(After()) == fingerprint(Before())
    assert fingerprint(After(masks=1)) != fingerprint(After())
    assert canonical(After(masks=1)) == {"size": 3, "masks": 1}
