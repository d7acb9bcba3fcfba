import itertools
import threading

import pytest

from ovref.ahead import READERS, map_ahead


@pytest.mark.parametrize("count", [0, 1, READERS, READERS + 1, 5 * READERS])
def test_results_come_in_the_order_of_the_items(count):
    late = threading.Event()

    def read(item):
        if item == 0 and count > READERS:
            assert late.wait(10)  # for a later one
        if item == READERS - 1:
            late.set()
        return -item

    assert list(map_ahead(read, range(count))) == [-item for item in range(count)]


def test_as_many_are_read_at_a_time():
    together = threading.Barrier(READERS)
    assert list(map_ahead(lambda item: together.wait(10) >= 0, range(READERS))) == [True] * READERS


def test_no_more_are_read_than_are_asked_for():
    """A million shards are not held when they are read faster than they are used."""
    read = []
    results = map_ahead(read.append, itertools.count())
    for taken in range(1, 50):
        next(results)
        assert len(read) <= taken + READERS
    results.close()


def test_an_error_is_raised_in_its_turn():
    def read(item):
        return 6 // (3 - item)

    results = map_ahead(read, range(10))
    assert [next(results) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_has_not_begun_is_not_begun_after_the_end(threads):
    """A batch that nobody wants any more is not made."""
    begun, stop = [], threading.Event()

    def work(item):
        begun.append(item)
        if item:
            assert stop.wait(10)
        return item

    results = map_ahead(work, range(100), threads)
    assert next(results) == 0
    threading.Timer(0.05, stop.set).start()
    results.close()
    assert len(begun) <= threads + 1


def test_items_are_taken_in_the_callers_thread():
    """Models and files behind an iterator are used by one thread."""
    takers = set()

    def items():
        for item in range(20):
            takers.add(threading.get_ident())
            yield item

    list(map_ahead(str, items(), 4))
    assert takers == {threading.get_ident()}
