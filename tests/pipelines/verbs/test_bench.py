"""The speed of a build's models: every batch size has its row, and nothing is written."""

import dataclasses

import pytest
from recipe_fakes import small_miniature_build

from ovref.errors import InputError
from ovref_pipelines.verbs.bench import Speed, bench, text


def test_every_batch_size_is_measured(tmp_path):
    config = small_miniature_build(tmp_path)
    rows = bench(config, 4, [1, 2])
    assert [row.batch_size for row in rows] == [1, 2] and not (tmp_path / "out").exists()
    for row in rows:
        assert row.images == 4 and row.references > 0
        assert min(row.seconds.values()) > 0 and row.peak_memory_gb > 0
    (own,) = bench(config, 2)
    assert own.batch_size == config.synthesize.batch_size


def test_a_corpus_without_nouns_is_refused(tmp_path):
    (tmp_path / "captions.txt").write_text("and then\n")
    config = small_miniature_build(tmp_path)
    corpus = dataclasses.replace(config.corpus, path=str(tmp_path / "captions.txt"))
    with pytest.raises(InputError, match="gives no prompt"):
        bench(dataclasses.replace(config, corpus=corpus))


def test_the_fastest_is_named():
    row = Speed(
        batch_size=8, images=2, references=4, dropped=0, peak_memory_gb=1.0,
        seconds={"images": 0.1, "references": 0.05, "writing": 0.05},
    )  # fmt: skip
    slow = dataclasses.replace(row, batch_size=4, seconds={"images": 1.0})
    found = text([row, slow])
    assert "batches of 8: 5 images/s (images 100.0 ms" in found
    assert found.endswith("fastest: batches of 8")
