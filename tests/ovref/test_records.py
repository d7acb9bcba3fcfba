import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from ovref.contract import Dropped, base_key
from ovref.records import NO, UNSURE, YES, ImageRecord, Noun, Reference, Region
from ovref.stored_images import UnusableImageError

CAT = Noun(text="cat", start=2, end=5)


def reference(**changes) -> Reference:
    values = {
        "key": "k#0",
        "noun": CAT,
        "caption": "a cat",
        "box_xyxy": (0, 0, 1, 1),
        "area": 0.5,
        "score": 0.5,
        "source": "daam",
        "seed": None,
        "visual": np.ones(4, np.float16),
        "textual": np.ones(3, np.float16),
    }
    return Reference(**{**values, **changes})


def image_record(image: bytes) -> ImageRecord:
    return ImageRecord(key="k", caption="a cat", source="", image=image, regions=())


def encoded(pixels: np.ndarray, file_format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=file_format)
    return file.getvalue()


@pytest.mark.parametrize(
    "mask_hw",
    [
        np.zeros((2, 3), bool),
        np.zeros((2, 3), np.int64),
        np.zeros((1, 2, 3), np.uint8),
        np.zeros(6, np.uint8),
    ],
)
def test_a_mask_is_two_dimensional_and_of_bytes(mask_hw):
    with pytest.raises(ValueError, match=r"mask_hw must be \(H, W\) uint8, found \(.*\) \w+"):
        Region(noun=CAT, mask_hw=mask_hw, score=1.0, source="daam")


def test_a_mask_has_three_values_that_a_png_keeps():
    mask_hw = np.array([[NO, UNSURE, YES]], np.uint8)
    assert Region(noun=CAT, mask_hw=mask_hw, score=1.0, source="daam").mask_hw is mask_hw
    assert mask_hw.tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("name", ["visual", "textual"])
@pytest.mark.parametrize("vector", [np.ones(4), np.ones((1, 4), np.float16), np.float16(1)])
def test_an_embedding_is_one_vector_of_half_floats(name, vector):
    with pytest.raises(ValueError, match=rf"{name} must be \(d,\) float16, found \(.*\) float"):
        reference(**{name: vector})


def test_records_are_frozen():
    for record in (CAT, reference(), image_record(b""), Dropped("k", "no_nouns")):
        name = dataclasses.fields(record)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, "other")


@pytest.mark.parametrize(
    "pixels",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
        np.arange(8, dtype=np.uint8).reshape(2, 4),
        np.arange(32, dtype=np.uint8).reshape(2, 4, 4),
    ],
    ids=["rgb", "grey", "rgba"],
)
def test_an_image_is_decoded_to_height_width_rgb(pixels):
    image_hwc = image_record(encoded(pixels, "png")).image_hwc()
    assert image_hwc.shape == (2, 4, 3) and image_hwc.dtype == np.uint8
    if pixels.ndim == 2:
        expected = pixels[..., None].repeat(3, 2)
    elif pixels.shape[2] == 3:
        expected = pixels
    else:  # over white
        alpha = pixels[..., 3:] / 255
        expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(image_hwc, expected, atol=1)


def test_a_corrupt_image_is_an_error_when_it_is_decoded():
    whole = encoded(np.zeros((64, 64, 3), np.uint8), "jpeg")
    for image, reason in [(b"", "empty_image"), (whole[:-20], "truncated_image")]:
        with pytest.raises(UnusableImageError, match=reason):
            image_record(image).image_hwc()


def test_the_key_of_a_region_leads_to_its_record():
    assert base_key("0a1b") == base_key("0a1b#0") == base_key("0a1b#12") == "0a1b"
