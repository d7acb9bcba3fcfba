import itertools
import threading

import pytest

from ovref.storage.ahead import READERS, read_ahead


@pytest.mark.parametrize("count", [0, 1, READERS, READERS + 1, 5 * READERS])
def test_results_come_in_the_order_of_the_items(count):
    late = threading.Event()

    def read(item):
        if item == 0 and count > READERS:
            assert late.wait(10)  # for a later one
        if item == READERS - 1:
            late.set()
        return -item

    assert list(read_ahead(read, range(count))) == [-item for item in range(count)]


def test_as_many_are_read_at_a_time():
    together = threading.Barrier(READERS)
    assert list(read_ahead(lambda item: together.wait(10) >= 0, range(READERS))) == [True] * READERS


def test_no_more_are_read_than_are_asked_for():
    """A million shards are not held when they are read faster than they are used."""
    read = []
    results = read_ahead(read.append, itertools.count())
    for taken in range(1, 50):
        next(results)
        assert len(read) <= taken + READERS
    results.close()


def test_an_error_is_raised_in_its_turn():
    def read(item):
        return 6 // (3 - item)

    results = read_ahead(read, range(10))
    assert [next(results) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)
