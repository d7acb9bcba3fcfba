"""Run: pytest tests/ovref/models/test_batch_size.py"""

import pytest

from ovref.models.batch_size import LARGEST, largest_batch

GB = 10**9


@pytest.mark.parametrize(
    ("peaks", "free", "expected"),
    [
        ({2: 2, 4: 4}, 40, 16),  # 20 GB at 1 an image
        ({2: 2, 4: 4}, 32, 16),  # fills its share to the last byte
        ({2: 2, 4: 4}, 31.9, 8),
        ({2: 2, 4: 4}, 4000, LARGEST),
        ({2: 10.2, 4: 10.4}, 24, 16),  # 10 GB however many there are: 11.6 of 12
        ({2: 10.2, 4: 10.4}, 23, 8),
        ({2: 10.2, 4: 10.4}, 20.1, 1),  # nothing fits
        ({2: 2, 4: 4}, 0, 1),
        ({2: 5, 4: 5}, 12, LARGEST),
        ({2: 5, 4: 4.9}, 10, LARGEST),
        ({2: 5}, 12, 2),  # four could not be generated
        ({2: 5}, 9, 1),
        ({}, 80, 1),  # not even two could
    ],
    ids=str,
)
def test_the_largest_batch(peaks, free, expected):
    found = largest_batch({size: int(peak * GB) for size, peak in peaks.items()}, int(free * GB))
    assert found == expected
