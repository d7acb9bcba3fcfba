import textwrap
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from ovref.config import STRICT, dump, load, parse
from ovref.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    __pydantic_config__ = STRICT

    threshold: float = 0.45
    method: Literal["max", "otsu"] = "max"
    size_hw: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], found {self.threshold}")


@dataclass(frozen=True, kw_only=True)
class Build:
    __pydantic_config__ = STRICT

    output: str
    heatmap: Heatmap = field(default_factory=Heatmap)
    second: Heatmap | None = None
    more: tuple[Heatmap, ...] = ()
    seed: int = 0
    gpu: bool = False
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output must name a folder, found an empty string")


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


def test_yaml_becomes_nested_frozen_dataclasses(written):
    path = written("""\
        output: runs/käse
        heatmap: {threshold: 0.5, size_hw: [32, 48]}
        more: [{method: otsu}, {}]
        names: [a, b]
        """)
    config = load(Build, path)
    assert config == Build(
        output="runs/käse",
        heatmap=Heatmap(threshold=0.5, size_hw=(32, 48)),
        more=(Heatmap(method="otsu"), Heatmap()),
        names=("a", "b"),
    )
    with pytest.raises(FrozenInstanceError):
        config.heatmap.threshold = 1.0


def test_whole_numbers_are_numbers_too(written):
    threshold = load(Build, written("{output: x, heatmap: {threshold: 1}}")).heatmap.threshold
    assert threshold == 1.0 and isinstance(threshold, float)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=3", {"seed": 3}),
        ("output=s3://bucket/a=b", {"output": "s3://bucket/a=b"}),
        ("gpu=true", {"gpu": True}),
        ("names=[a, b]", {"names": ("a", "b")}),
        ("names=[]", {"names": ()}),
        ("heatmap.threshold=0.25", {"heatmap": Heatmap(threshold=0.25)}),
        ("heatmap.size_hw=[1, 2]", {"heatmap": Heatmap(size_hw=(1, 2))}),
        ("heatmap={method: otsu}", {"heatmap": Heatmap(method="otsu")}),
        ("second.method=otsu", {"second": Heatmap(method="otsu")}),
        ("second=null", {"second": None}),
        ("second=", {"second": None}),
    ],
)
def test_overrides_are_yaml_at_a_path(written, override, changed):
    config = load(Build, written("output: x"), [override])
    assert config == Build(**{"output": "x", **changed})


def test_overrides_leave_the_file_as_it_is(written):
    path = written("{output: x, seed: 1}")
    assert load(Build, path, ["seed=3"]).seed == 3
    assert load(Build, path).seed == 1


@dataclass(frozen=True, kw_only=True)
class Otsu:
    __pydantic_config__ = STRICT

    bins: int = 8
    name: str = "otsu"


@dataclass(frozen=True, kw_only=True)
class Nested:
    """Every default here differs from what its own class has."""

    __pydantic_config__ = STRICT

    heatmap: Heatmap = Heatmap(threshold=0.1, method="otsu")
    either: Heatmap | Otsu | None = Otsu(bins=3)
    items: tuple[Heatmap, ...] = (Heatmap(threshold=0.1), Heatmap(threshold=0.2, method="otsu"))
    weights: dict[str, float] = field(default_factory=lambda: {"a": 1.0, "b": 2.0})
    place: str | None = None
    either_kind: str | int | None = None
    build: Build = Build(output="x", heatmap=Heatmap(threshold=0.3), second=Heatmap(threshold=0.2))


@pytest.mark.parametrize(
    ("text", "override", "changed"),
    [
        ("heatmap: {threshold: 0.7}", "heatmap.threshold=0.7",
         {"heatmap": Heatmap(threshold=0.7, method="otsu")}),
        ("heatmap: {threshold: 0.7}", "heatmap={threshold: 0.7}",
         {"heatmap": Heatmap(threshold=0.7, method="otsu")}),
        ("either: {name: o}", "either.name=o", {"either": Otsu(bins=3, name="o")}),
        ("either: {threshold: 0.7}", "either={threshold: 0.7}", {"either": Heatmap(threshold=0.7)}),
        ("either: null", "either=null", {"either": None}),
        ("build: {heatmap: {method: otsu}}", "build.heatmap.method=otsu",
         {"build": Build(output="x", heatmap=Heatmap(threshold=0.3, method="otsu"),
                         second=Heatmap(threshold=0.2))}),
        ("build: {second: {method: otsu}}", "build.second.method=otsu",
         {"build": Build(output="x", heatmap=Heatmap(threshold=0.3),
                         second=Heatmap(threshold=0.2, method="otsu"))}),
        (None, "items.1.threshold=0.7",
         {"items": (Heatmap(threshold=0.1), Heatmap(threshold=0.7, method="otsu"))}),
        (None, "weights.b=3", {"weights": {"a": 1.0, "b": 3.0}}),
    ],
)  # fmt: skip
def test_nested_settings_change_the_field_s_default_and_keep_the_rest(
    written, text, override, changed
):
    expected = Nested(**changed)
    assert load(Nested, None, [override]) == expected
    assert text is None or load(Nested, written(text)) == expected


def test_an_override_changes_what_the_file_says_and_keeps_the_rest(written):
    path = written("{heatmap: {size_hw: [1, 2]}, items: [{method: otsu}]}")
    config = load(Nested, path, ["heatmap.threshold=0.7", "items.0.threshold=0.2"])
    assert config.heatmap == Heatmap(threshold=0.7, method="otsu", size_hw=(1, 2))
    assert config.items == (Heatmap(threshold=0.2, method="otsu"),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/run #1", "runs/run #1"), ("a: b", "a: b"), ("[x", "[x"),
        ("2024-01-01", "2024-01-01"),
        ("12", "12"), ("on", "on"), ("'null'", "null"), ('"~"', "~"), ("~/x", "~/x"), ("*x", "*x"),
        ("~", None), ("null", None), ("", None),
    ],
)  # fmt: skip
def test_text_is_taken_as_it_is_typed(text, expected):
    assert load(Nested, None, [f"place={text}"]).place == expected


def test_dates_are_text_and_powers_of_ten_are_numbers(written):
    assert load(Build, written("output: 2024-01-01")).output == "2024-01-01"
    assert load(Nested, None, ["either_kind=2024-01-01"]).either_kind == "2024-01-01"
    assert load(Nested, None, ["either_kind=7"]).either_kind == 7
    assert load(Heatmap, None, ["threshold=1e-3"]).threshold == 0.001


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sede=3"], "sede=3: unknown key sede"),
        (["seed=3", "seed=4"], "'seed=4' would undo 'seed=3': give one of them"),
        (["heatmap.threshold=0", "heatmap={}"], "'heatmap={}' would undo 'heatmap.threshold=0'"),
        (["seed=3 # of today"], "YAML takes '# of today' for a comment"),
        (["seed=x"], "seed=x: seed: Input should be a valid integer, found 'x'"),
        (["heatmap.threshold=2"],
         "config.yaml with heatmap.threshold=2: heatmap: threshold must be in [0, 1], found 2"),
        (["more.2.method=otsu"], "'more.2.method=otsu': there is a list of 1, which has no 2"),
        (["more.last.method=otsu"], "there is a list of 1, which has no last"),
        (["gpu=true", "names=[1]"], "names=[1]: names.0: Input should be a valid string"),
    ],
)  # fmt: skip
def test_an_override_is_blamed_for_its_own_errors(written, overrides, message):
    path = written("{output: x, seed: 1, more: [{}]}")
    with pytest.raises(ConfigError) as caught:
        load(Build, path, overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{output: x, sede: 1}", "unknown key sede (known here: output, heatmap, second, more"),
        (
            "{output: x, heatmap: {treshold: 0.5}}",
            "unknown key heatmap.treshold (known here: threshold, method, size_hw)",
        ),
        ("{output: x, second: {a: 1}}", "unknown key second.a (known here: threshold"),
        ("{output: x, more: [{}, {a: 1}]}", "unknown key more.1.a (known here: threshold"),
        ("{output: x, 1: 2}", "unknown key 1"),
        ("seed: 1", "missing key output"),
        ("", "missing key output"),
        ("{output: x, seed: '1'}", "seed: Input should be a valid integer, found '1'"),
        ("{output: x, seed: 1.5}", "seed: Input should be a valid integer, found 1.5"),
        ("{output: x, seed: true}", "seed: Input should be a valid integer, found True"),
        ("{output: x, gpu: 1}", "gpu: Input should be a valid boolean, found 1"),
        ("{output: 1}", "output: Input should be a valid string, found 1"),
        ("{output: x, seed: null}", "seed: Input should be a valid integer, found None"),
        ("{output: x, heatmap: 1}", "heatmap: Input should be an object, found 1"),
        ("{output: x, heatmap: {method: mean}}", "heatmap.method: Input should be 'max' or 'otsu'"),
        ("{output: x, heatmap: {size_hw: [1]}}", "missing key heatmap.size_hw.1"),
        ("{output: x, heatmap: {size_hw: [1, 2, 3]}}", "heatmap.size_hw"),
        ("{output: x, heatmap: {threshold: 1.5}}", "heatmap: threshold must be in [0, 1], found 1"),
        ("{output: ''}", "config.yaml: output must name a folder, found an empty string"),
        ("{output: x, heatmap: {threshold: .nan}}", "not JSON compliant"),
        ("{output: x, heatmap: {threshold: .inf}}", "not JSON compliant"),
        ("{output: x, seed: 2020-01-01}", "seed: Input should be a valid integer, found '2020-"),
        ("{output: x, heatmap: {threshold: 0.1, threshold: 0.2}}", "found the key threshold twice"),
        ("output: x\noutput: y", "found the key output twice"),
        ("output: [", "cannot read the configuration"),
        ("output: !!python/object/apply:os.getcwd []", "cannot read the configuration"),
        ("- output", "must hold a mapping of settings, found list"),
        ("output", "must hold a mapping of settings, found str"),
    ],
)
def test_nothing_wrong_is_ignored(written, text, message):
    path = written(text)
    with pytest.raises(ConfigError) as caught:
        load(Build, path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_all_that_is_wrong_is_said_at_once(written):
    with pytest.raises(ConfigError) as caught:
        load(Build, written("{output: 1, seed: x, heatmap: {a: 1}}"))
    for name in ("output: ", "seed: ", "heatmap.a"):
        assert name in str(caught.value)


def test_the_known_keys_of_a_level_are_listed_once(written):
    with pytest.raises(ConfigError) as caught:
        load(Build, written("{output: x, a: 1, b: 1, heatmap: {c: 1}}"))
    assert str(caught.value).count("known here: output") == 1
    for name in ("unknown key a", "unknown key b", "unknown key heatmap.c (known here: threshold"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "an override has the form key=value, found 'seed'"),
        ("=1", "an override has the form key=value, found '=1'"),
        ("seed.more=1", "'seed.more=1': seed is a single value without settings"),
        ("seed=[", "'seed=\\[': the value is not YAML"),
        ("seed=x", "seed: Input should be a valid integer, found 'x'"),
        ("heatmap.treshold=1", r"unknown key heatmap.treshold \(known here: threshold"),
        ("heatmap={method: max, method: otsu}", "found the key method twice"),
    ],
)
def test_a_wrong_override_is_explained(written, override, message):
    with pytest.raises(ConfigError, match=message):
        load(Build, written("{output: x, seed: 1}"), [override])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*absent\.yaml"):
        load(Build, tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes("output: käse".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*latin\.yaml"):
        load(Build, tmp_path / "latin.yaml")


def test_the_effective_configuration_comes_back(written):
    config = Build(output="x", second=Heatmap(threshold=0.1), more=(Heatmap(),), names=("a",))
    assert parse(Build, dump(config)) == config
    assert load(Build, written(yaml.safe_dump(dump(config)))) == config
    assert dump(config)["heatmap"] == {"threshold": 0.45, "method": "max", "size_hw": [64, 64]}
