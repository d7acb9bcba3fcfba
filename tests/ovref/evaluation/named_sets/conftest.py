"""Writers of small photographs and label files, and the slow rule that labels are checked by."""

import numpy as np
import pytest
from PIL import Image

from ovref.evaluation.named_sets.opening import open_set

ORIENTATION = 0x0112


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def photo():
    """Writes a photograph, with an EXIF orientation where asked."""

    def write(path, size_hw, orientation=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, columns = np.indices(size_hw)
        pixels_hwc = np.stack([rows * 7, columns * 5, rows + columns], -1) % 256
        exif = Image.Exif()
        if orientation:
            exif[ORIENTATION] = orientation
        Image.fromarray(pixels_hwc.astype(np.uint8)).save(path, exif=exif)

    return write


@pytest.fixture
def index_file():
    """Writes a label file: greyscale of the array's own depth, or with VOC's palette."""

    def write(path, values_hw, palette=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(values_hw)
        if palette:
            image.putpalette(voc_palette())
        image.save(path)

    return write


def voc_palette() -> list[int]:
    """VOC's colour map: the bits of an index spread over red, green and blue, highest first."""
    flat = []
    for index in range(256):
        colour = [0, 0, 0]
        for bit in range(3):
            for channel in range(3):
                colour[channel] |= (index >> (bit * 3 + channel) & 1) << 7 - bit
        flat += colour
    return flat


@pytest.fixture
def check():
    """Opens a set and compares its labels with a slow rule, one pixel at a time."""

    def compare(name, root, values, rule, split="val"):
        data = open_set(name, root, split)
        assert data.ids == tuple(values)
        for example in data:
            values_hw = values[example.id]
            expected_hw = [[rule(value) for value in row] for row in values_hw.tolist()]
            np.testing.assert_array_equal(example.label_hw, expected_hw)
            assert example.label_hw.dtype == np.int32
            assert example.image_hwc.shape == (*values_hw.shape, 3)
            assert example.label_hw.max() < len(data.class_names)
        return data

    return compare
