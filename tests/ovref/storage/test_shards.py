"""Run: pytest tests/ovref/storage/test_shards.py"""

import dataclasses
import io
import time

import numpy as np
import pytest
from PIL import Image

from ovref.records import NO, UNSURE, YES, ImageRecord, Noun, Region
from ovref.storage import codec, shards
from ovref.storage.shards import ShardFiles, read_tar
from ovref_inference.places import sha256_of


def image_record(key, side=24, heatmaps=1):
    mask_hw = np.full((side, side), NO, np.uint8)
    mask_hw[4:12, 4:14], mask_hw[12:13] = YES, UNSURE
    region = Region(noun=Noun(text="cat", start=0, end=3), mask_hw=mask_hw, score=1.0, source="x")
    return ImageRecord(
        key=key, caption="cat", source="x", image=b"\xff\xd8\xff" + key.encode(), regions=(region,),
        heatmaps_nhw=np.zeros((heatmaps, 4, 4), np.float16),
    )  # fmt: skip


def written(records):
    with ShardFiles() as files:
        for record in records:
            files.add(record)
        paths = files.finish([])
        read = [record.key for record in read_tar(paths["tar"], "shard")]
        return read, {name: sha256_of(path) for name, path in paths.items()}


def test_images_encoded_by_several_threads_are_written_in_order(monkeypatch):
    records = [image_record(f"k{n:02}") for n in range(30)]
    monkeypatch.setattr(shards, "ENCODERS", 1)
    expected = written(records)
    assert expected[0] == [record.key for record in records]
    encode = codec.encode

    def slow_at_times(record):
        time.sleep(0.02 if int(record.key[1:]) % 4 == 0 else 0)
        return encode(record)

    monkeypatch.setattr(codec, "encode", slow_at_times)
    monkeypatch.setattr(shards, "ENCODERS", 4)
    assert written(records) == expected


def test_an_image_that_cannot_be_encoded_fails_the_shard():
    with ShardFiles() as files:
        files.add(image_record("k0"))
        with pytest.raises(ValueError, match="k1: heatmaps_nhw must be"):
            files.add(image_record("k1", heatmaps=2))
            files.finish([])


def test_masks_are_smaller_than_by_the_default_search():
    rng = np.random.default_rng(0)
    heat = Image.fromarray(rng.random((8, 8)).astype(np.float32))
    heat_hw = np.asarray(heat.resize((512, 512), Image.Resampling.BICUBIC))
    mask_hw = np.where(heat_hw > 0.55, YES, np.where(heat_hw > 0.5, UNSURE, NO)).astype(np.uint8)
    region = Region(noun=Noun(text="cat", start=0, end=3), mask_hw=mask_hw, score=1.0, source="x")
    record = dataclasses.replace(image_record("k"), regions=(region,))
    kept = codec.encode(record)["masks.png"]
    default = io.BytesIO()
    Image.fromarray(mask_hw).save(default, "png")
    assert len(kept) < len(default.getvalue())
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(kept))), mask_hw)
