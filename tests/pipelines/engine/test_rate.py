"""Rates of processing."""

import pytest

from ovref_pipelines.engine.rate import Rate


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_none_before_the_first_record(clock):
    rate = Rate(clock)
    clock.now = 100
    assert rate.per_second() is None and rate.to_go(10) is None


def test_the_rate_is_that_of_recent_changes(clock):
    rate, count = Rate(clock), 0
    for seconds in [100] * 50 + [1] * 40:
        clock.now += seconds
        count += 10
        rate.at(count)
    assert rate.per_second() == 10.0


def test_between_batches_the_rate_stands_and_the_time_to_go_runs_down(clock):
    rate = Rate(clock)
    for clock.now in (20, 40):
        rate.at(int(clock.now) * 2)
    assert (rate.per_second(), rate.to_go(80)) == (2.0, 40.0)
    clock.now = 55
    assert (rate.per_second(), rate.to_go(80)) == (2.0, 25.0)


def test_a_batch_that_is_late_lowers_the_rate(clock):
    rate = Rate(clock)
    for clock.now in (20, 40):
        rate.at(int(clock.now) * 2)
    clock.now = 100  # 40 s later than any batch before
    assert (rate.per_second(), rate.to_go(80)) == (1.0, 60.0)


def test_changes_close_together_are_one_and_many_workers_are_averaged(clock):
    rate = Rate(clock)
    rate.begin(workers=64)
    for step in range(1, 2001):  # 64 workers, 20 changes a second
        clock.now = step / 20
        rate.at(step)
    assert rate.per_second() == pytest.approx(20, rel=0.05)
    assert len(rate._changes) < 110


def test_lost_work_lowers_the_count(clock):
    rate = Rate(clock)
    for clock.now, count in ((10, 40), (20, 0)):
        rate.at(count)
    assert rate.per_second() is None
