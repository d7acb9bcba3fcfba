import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reduce_fakes import D_VISUAL, direction, make_references

from ovref.config import parse
from ovref.errors import InputError
from ovref.identity import canonical
from ovref.reduce import FilterSpec, ReduceSpec
from ovref.reduce.filter import DROPPED, filter_references
from ovref.reduce.gather import USABLE, gather
from ovref.reduce.inputs import Shards
from ovref.storage.file_store import Store
from ovref_inference.collection import format as fmt
from ovref_inference.collection import store as collections
from ovref_inference.collection.prototypes import PrototypeConfig
from ovref_inference.collection.reference_collection import ReferenceCollection
from ovref_inference.vectors import l2_normalised

NONE = np.zeros(0, dtype=np.int64)


def spec(**filters):
    return ReduceSpec(
        filter=FilterSpec(**filters), prototypes=PrototypeConfig(k=4, min_references=8)
    )


def keys(folder):
    with ReferenceCollection.open(folder, verify="full") as collection:
        rows = collection.rows(range(len(collection)))
    assert [row["id"] for row in rows] == list(range(len(rows)))
    return [row["key"] for row in rows]


def gathered(references):
    return [reference for number in range(3) for reference in references[number::3]]


def counts_of(summary):
    return {step["filter"]: (step["before"], step["after"]) for step in summary["filter"]}


def test_nothing_is_dropped_by_default(place, reduced):
    references = make_references()
    target, summary = reduced(place(references), spec())
    assert keys(target) == [r.key for r in gathered(references)]
    assert counts_of(summary) == {"unusable_vectors": (118, 118), "repeated_key": (118, 118)}


def test_score_and_area_limits(place, reduced, tmp_path):
    references = make_references()
    work = tmp_path / "work"
    target, summary = reduced(
        place(references), spec(min_score=0.3, min_area=0.1, max_area=0.6), work=work
    )
    right_area = [r for r in gathered(references) if 0.1 <= np.float32(r.area) <= np.float32(0.6)]
    kept = [r for r in right_area if r.score >= 0.3]
    assert keys(target) == [r.key for r in kept]
    found = counts_of(summary)
    assert found["area"] == (118, len(right_area))
    assert found["score"] == (len(right_area), len(kept))
    dropped = pq.read_table(next(work.glob(f"*-{DROPPED}"))).to_pydict()
    assert len(dropped["key"]) == 118 - len(kept)
    assert set(dropped["reason"]) == {"area", "score"}
    assert not set(dropped["key"]) & {r.key for r in kept}


def test_limits_include_their_ends(place, reduced):
    areas = [0.25, 0.5, 0.125, 0.75] * 4
    references = [
        dataclasses.replace(reference, area=area, score=0.5)
        for reference, area in zip(make_references({"cat": 16}), areas, strict=True)
    ]
    target, summary = reduced(place(references), spec(min_area=0.25, max_area=0.5, min_score=0.5))
    assert counts_of(summary)["area"] == (16, 8) and counts_of(summary)["score"] == (8, 8)
    with ReferenceCollection.open(target) as collection:
        assert len(collection.references_of("cat")) == 8


def test_a_threshold_of_zero_is_a_threshold(place, reduced):
    references = make_references({"cat": 6})
    references[0] = dataclasses.replace(references[0], score=-0.5)
    target, _ = reduced(place(references), spec(min_score=0.0))
    assert len(keys(target)) == 5


def test_repeated_keys_are_taken_once(place, reduced):
    references = make_references()
    twice = [*references, *references[:10]]
    target, summary = reduced(place(twice), spec())
    assert sorted(keys(target)) == sorted(r.key for r in references)
    assert counts_of(summary)["repeated_key"] == (128, 118)


def test_near_duplicates_are_dropped_within_a_noun_only(place, reduced):
    base = make_references({"cat": 1, "dog": 1})
    same = l2_normalised(direction("same", D_VISUAL)).astype(np.float16)
    near = l2_normalised(same + 0.001 * direction("x", D_VISUAL)).astype(np.float16)
    far = l2_normalised(direction("far", D_VISUAL)).astype(np.float16)
    cat, dog = sorted(base, key=lambda r: r.noun.text)
    references = [
        dataclasses.replace(one, key=f"{number:02d}#0", visual=visual)
        for number, (one, visual) in enumerate(
            [(cat, same), (dog, same), (cat, near), (cat, far), (cat, same)]
        )
    ]
    target, summary = reduced(place(references, shards=1), spec(duplicate_cosine=0.999))
    assert keys(target) == ["00#0", "01#0", "03#0"]
    assert counts_of(summary)["near_duplicate"] == (5, 3)


def mislabelled(share=0.15):
    """Tight clusters, some references of which carry another noun."""
    rng = np.random.default_rng(3)
    references = make_references({"boat": 60, "cat": 60, "tree": 60, "owl": 2}, noise=0.08)
    wrong = rng.random(len(references)) < share
    swapped = {"boat": "cat", "cat": "tree", "tree": "boat"}
    for number in np.flatnonzero(wrong):
        old = references[number]
        if old.noun.text == "owl":
            wrong[number] = False
            continue
        noun = dataclasses.replace(old.noun, text=swapped[old.noun.text])
        references[number] = dataclasses.replace(old, noun=noun)
    return references, wrong


def test_the_noun_agreement_finds_wrong_nouns(place, reduced):
    references, wrong = mislabelled()
    target, summary = reduced(place(references), spec(min_noun_agreement=0.5))
    kept = set(keys(target))
    caught = sum(r.key not in kept for r, bad in zip(references, wrong, strict=True) if bad)
    lost = sum(r.key not in kept for r, bad in zip(references, wrong, strict=True) if not bad)
    assert caught == wrong.sum() > 10
    assert lost == 0
    assert counts_of(summary)["noun_agreement"] == (182, 182 - caught)
    found = summary["noun_agreement"]
    assert found["judged"] == 180  # the two owls are too few to judge, and kept
    assert found["mean_before"] < 0.8 < found["mean_of_kept"]


def test_the_noun_agreement_by_an_inverted_file_on_disk(place, reduced, monkeypatch, tmp_path):
    """As many references as need lists: the index is made by parts, mapped, and gone in the end."""
    references, _ = mislabelled()
    _, exact = reduced(place(references), spec(min_noun_agreement=0.5), "exact")
    monkeypatch.setattr("ovref.reduce.indexing.choose_index", lambda n, dim: "IVF4,SQfp16")
    monkeypatch.setattr("ovref.reduce.indexing.PART_ROWS", 50)
    monkeypatch.setattr("ovref.reduce.ivf.BLOCK", 25)
    step, report = place(references, run=1), lambda *event: None
    found, out = tmp_path / "gathered", tmp_path / "filtered"
    for folder in (found, out):
        folder.mkdir()
    gather(None, [Shards(step, step.commits())], found, report)
    limits = FilterSpec(min_noun_agreement=0.5)
    summary = filter_references(found, out, limits, existing=0, deleted=NONE, seed=0, report=report)
    assert summary["noun_agreement"] == exact["noun_agreement"]
    assert counts_of({"filter": summary["steps"]}) == counts_of(exact)
    kept = {fmt.FILES[role] for role in ("visual", "textual", "references")} | {DROPPED}
    assert {path.name for path in out.iterdir()} == kept


def test_nouns_of_which_nothing_is_left_are_counted_and_named(place, reduced):
    captions = {"boat": "harbour", "dog": "park", "lion": "harbour park"}
    references = [
        dataclasses.replace(one, caption=captions.get(one.noun.text, one.caption))
        for one in make_references()
    ]
    twice = [*references, *references[:10]]  # a key that occurs again is no loss
    target, summary = reduced(place(twice), spec(blocked_captions=("harbour", "park")))
    assert summary["lost_nouns"] == {
        "nouns": 3, "references": 68, "most_frequent": [["boat", 40], ["dog", 25], ["lion", 3]],
    }  # fmt: skip
    assert collections.read_manifest(str(target)).build["summary"]["lost_nouns"]["nouns"] == 3
    _, plain = reduced(place(references, run=1), spec(blocked_captions=("number 1",)), "plain")
    assert "lost_nouns" not in plain and plain["filter"][-1]["after"] < 118


def test_a_noun_whose_references_are_kept_or_deleted_is_not_lost(place, reduced):
    """When a collection grows: cats were there, dogs were deleted and do not come back."""
    old = make_references({"cat": 9, "dog": 9, "tree": 9})
    target, _ = reduced(place(old), spec())
    with ReferenceCollection.open(target) as collection:
        dogs = collection.references_of("dog")
    collections.tombstone(str(target), dogs, "opt-out")
    new = make_references({"cat": 5, "boat": 4}, seed=1)
    again = [one for one in old if one.noun.text == "dog"]
    step = place(new + again, run=1)
    _, summary = reduced(step, spec(blocked_captions=("a",)), base=Store.open(str(target)))
    assert summary["lost_nouns"] == {
        "nouns": 1, "references": 4, "most_frequent": [["boat", 4]]
    }  # fmt: skip


def test_filters_leaving_nothing_are_an_error(place, reduced, tmp_path):
    with pytest.raises(InputError, match=r"leave none of 118 references.*score 118"):
        reduced(place(make_references()), spec(min_score=2.0))
    assert not (tmp_path / "collection").exists()


def spoilt_shard(place, row, name, value):
    """A step whose sidecar has a bad vector: what storage refuses to write, a fault could bring."""
    references = make_references({"cat": 9})
    step = place(references, shards=1)
    table = step.table("00000")
    vectors = np.array([r.visual if name == "visual" else r.textual for r in references])
    vectors[row] = value
    array = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), array)

    class Spoilt:
        """The step, with the spoilt table."""

        def __getattr__(self, attribute):
            return getattr(step, attribute)

        def table(self, shard):
            return table

    return references, Spoilt()


@pytest.mark.parametrize("name", ["visual", "textual"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 3.0])
def test_vectors_that_cannot_be_indexed_never_are(place, tmp_path, name, value):
    references, step = spoilt_shard(place, 4, name, value)
    report = lambda *event: None  # noqa: E731
    for folder in ("gather", "filter"):
        (tmp_path / folder).mkdir()
    gather(None, [Shards(step, step.commits())], tmp_path / "gather", report)
    summary = filter_references(
        tmp_path / "gather",
        tmp_path / "filter",
        FilterSpec(),
        existing=0,
        deleted=NONE,
        seed=0,
        report=report,
    )
    assert summary["steps"][0] == {"filter": "unusable_vectors", "before": 9, "after": 8}
    assert np.flatnonzero(~np.load(tmp_path / "gather" / USABLE)).tolist() == [4]
    visual = fmt.open_vectors(tmp_path / "filter" / fmt.FILES["visual"])
    np.testing.assert_array_equal(visual, [r.visual for r in references[:4] + references[5:]])
    rows = pq.read_table(tmp_path / "filter" / fmt.FILES["references"])
    assert rows.column("key").to_pylist() == [r.key for r in references[:4] + references[5:]]
    assert rows.column("id").to_pylist() == list(range(8))


def test_growing_filters_only_what_is_new(place, reduced):
    first = make_references(seed=0)
    second = make_references(seed=1)
    # Both the old collection and the new shards have references below the limits.
    again = dataclasses.replace(first[5], key="ff#0", score=0.9)
    target, _ = reduced(place(first, run=0), spec())
    limits = spec(min_score=0.5, duplicate_cosine=0.9999)
    new = place([*second, again], run=1)
    _, summary = reduced(new, limits, base=Store.open(str(target)))
    kept = [r.key for r in gathered([*second, again]) if r.score >= 0.5 and r.key != "ff#0"]
    assert keys(target) == [r.key for r in gathered(first)] + kept
    assert summary["added"] == len(kept)
    assert counts_of(summary)["near_duplicate"] == (118 + len(kept) + 1, 118 + len(kept))


def test_what_is_deleted_neither_repeats_nor_judges_what_is_new(place, reduced):
    """Bad references are deleted so that better ones can take their place."""
    cats = make_references({"cat": 30}, noise=0.08)
    wrong = dataclasses.replace(cats[0].noun, text="dog")
    named_dogs = [dataclasses.replace(cat, noun=wrong) for cat in cats]
    dogs = make_references({"dog": 30}, seed=1, noise=0.08)
    target, _ = reduced(place(named_dogs + dogs, shards=1), spec())
    collections.tombstone(str(target), range(30), "wrong nouns")
    # The same regions under their true name, and, of dogs, one deleted and one that is not.
    collections.tombstone(str(target), [30], "opt-out")
    new = [dataclasses.replace(cat, key=f"{number:02d}#0") for number, cat in enumerate(cats)]
    new += [dataclasses.replace(dog, key=f"d{number}#0") for number, dog in enumerate(dogs[:2])]
    limits = spec(duplicate_cosine=0.99999, min_noun_agreement=0.5)
    step = place(new, run=1, shards=1)
    _, summary = reduced(step, limits, base=Store.open(str(target)))
    assert counts_of(summary)["near_duplicate"] == (92, 91)
    assert counts_of(summary)["noun_agreement"] == (91, 91)
    assert summary["noun_agreement"]["judged"] == 91 - 31
    with ReferenceCollection.open(target, verify="full") as collection:
        kept = [row["key"] for row in collection.rows(np.arange(60, 91))]
        assert len(collection) == 91 - 31
    assert kept == [*(r.key for r in new[:30]), "d0#0"]


def test_more_rows_than_a_row_group_or_a_chunk(place, reduced, monkeypatch):
    monkeypatch.setattr("ovref.reduce.filter._CHUNK", 17)
    monkeypatch.setattr("ovref_inference.collection.format.ROW_GROUP", 16)
    monkeypatch.setattr("ovref.reduce.gather.ROW_GROUP", 16)
    first, second = make_references(seed=0), make_references(seed=1)
    target, _ = reduced(place(first, run=0), spec(min_score=0.1))
    reduced(place(second, run=1), spec(min_score=0.1), base=Store.open(str(target)))
    expected = [r for r in gathered(first) + gathered(second) if r.score >= 0.1]
    assert keys(target) == [r.key for r in expected]
    with ReferenceCollection.open(target) as collection:
        np.testing.assert_array_equal(collection.visual, [r.visual for r in expected])
        boats = [i for i, r in enumerate(expected) if r.noun.text == "boat"]
        assert collection.references_of("boat").tolist() == boats


def measured(references, **values):
    """The references with these measures, row by row."""
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    return [
        dataclasses.replace(reference, measures=row)
        for reference, row in zip(references, rows, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "setting", "limit", "reason"),
    [
        ("clip", "min_clip_agreement", 0.25, "clip_agreement"),
        ("entropy", "max_entropy", 0.5, "entropy"),
        ("components", "max_components", 2, "components"),
        ("unsafe", "max_unsafe", 0.75, "unsafe"),
    ],
)
def test_limits_of_what_was_measured(place, reduced, name, setting, limit, reason):
    values = [limit, limit - 0.01, limit + 0.01, np.nan] * 5
    references = measured(make_references({"cat": 20}), **{name: values, "other": range(20)})
    target, summary = reduced(place(references), spec(**{setting: limit}))
    good = {r.key for r in references if not r.measures[name] < limit} if setting.startswith(
        "min"
    ) else {r.key for r in references if not r.measures[name] > limit}  # fmt: skip
    assert set(keys(target)) == good and len(good) == 15
    assert counts_of(summary)[reason] == (20, 15)


def test_a_filter_needs_what_it_limits(place, reduced):
    for setting, advice in (
        ({"max_entropy": 0.5}, r"needs 'entropy'.*embed.measures=\{\}"),
        ({"max_unsafe": 0.5}, "embed.measures.safety.model"),
    ):
        with pytest.raises(InputError, match=advice):
            reduced(place(make_references({"cat": 6})), spec(**setting))


def test_unsafe_images_are_flagged_and_kept_without_a_limit(place, reduced):
    references = measured(make_references({"cat": 6}), unsafe=[0.1, 0.6, 0.5, 0.9, np.nan, 0.0])
    target, summary = reduced(place(references), spec())
    assert summary["flagged"] == {"unsafe": 2} and len(keys(target)) == 6
    _, plain = reduced(place(make_references({"cat": 6}), run=1), spec(), "plain")
    assert "flagged" not in plain


def test_blocked_words_are_whole_words_in_any_case(place, reduced):
    captions = ["a Gun", "a gunman", "two dead cats", "a red  gun-fight", "dead end", "a cat"]
    references = [
        dataclasses.replace(reference, caption=caption)
        for reference, caption in zip(make_references({"cat": 6}), captions, strict=True)
    ]
    blocked = ("gun", "dead cats")
    target, summary = reduced(place(references), spec(blocked_captions=blocked))
    assert set(keys(target)) == {references[i].key for i in (1, 4, 5)}
    assert counts_of(summary)["blocked_caption"] == (6, 3)


def test_blocked_words_are_read_from_a_file(tmp_path):
    (tmp_path / "words.txt").write_text("gun\ndead cats\n")
    found = parse(FilterSpec, {"blocked_captions": str(tmp_path / "words.txt")})
    assert found.blocked_captions == ("gun", "dead cats")
    assert parse(FilterSpec, {"blocked_captions": ["gun"]}).blocked_captions == ("gun",)
    assert "blocked_captions" not in canonical(FilterSpec())


def test_outliers_of_a_noun_are_dropped(place, reduced):
    references = make_references({"cat": 30, "dog": 30})
    cats = [i for i, reference in enumerate(references) if reference.noun.text == "cat"]
    dog = next(reference for reference in references if reference.noun.text == "dog")
    for i in cats[:3]:
        references[i] = dataclasses.replace(references[i], visual=dog.visual)
    target, summary = reduced(place(references), spec(outlier_deviations=4.0))
    lost = {reference.key for reference in references} - set(keys(target))
    assert {references[i].key for i in cats[:3]} <= lost
    assert counts_of(summary)["outlier"] == (60, 60 - len(lost)) and len(lost) <= 6
