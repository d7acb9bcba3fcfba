"""The progress line: honest rates and times."""

import io

from ovref_pipelines.engine.progress import Progress, Throttle, duration


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_no_estimate_before_the_first_shard_and_earlier_shards_do_not_count():
    clock = Clock()
    progress = Progress("images", stream=io.StringIO(), clock=clock)
    progress.begin(total=10, done=6, records_to_go=400, workers=1)
    assert progress.line() == "images: 6/10 shards, time to go unknown until a shard is finished"
    clock.now = 100  # the models load
    progress.working(1)
    clock.now = 110
    progress.finished(100, {"no_nouns": 3})
    assert progress.line() == "images: 7/10 shards, 10 records/s, 30 s to go, 3 drops"


def test_the_rate_is_that_of_recent_shards():
    clock = Clock()
    progress = Progress("images", stream=io.StringIO(), clock=clock)
    progress.begin(total=1000, done=0, records_to_go=10_000, workers=1)
    for seconds in [100] * 50 + [1] * 20:
        clock.now += seconds
        progress.finished(10, {})
    assert progress.records_per_second() == 10.0


def test_an_idle_wait_lowers_the_rate():
    clock = Clock()
    progress = Progress("images", stream=io.StringIO(), clock=clock)
    progress.begin(total=2, done=0, records_to_go=20, workers=1)
    clock.now = 1
    progress.finished(10, {})
    clock.now = 10
    assert progress.records_per_second() == 1.0


def test_quarantined_shards_are_shown_and_not_waited_for():
    clock = Clock()
    progress = Progress("images", stream=io.StringIO(), clock=clock)
    progress.begin(total=3, done=0, records_to_go=30, workers=1)
    clock.now = 1
    progress.finished(10, {})
    progress.set_aside(10)
    assert progress.line() == "images: 1/3 shards, 10 records/s, 1 s to go, 1 quarantined"


def forty_of_a_hundred(stream, clock):
    progress = Progress("images", stream=stream, every_seconds=10, clock=clock)
    progress.begin(total=100, done=0, records_to_go=100, workers=1)
    for _ in range(40):
        clock.now += 1
        progress.finished(1, {})
    return progress


def test_a_log_gets_a_line_every_so_often():
    log = io.StringIO()
    progress = forty_of_a_hundred(log, Clock())
    progress.say("a message")
    progress.close()
    lines = log.getvalue().splitlines()
    assert lines[1] == "images: 10/100 shards, 1 records/s, 2 min to go"
    assert len(lines) == 6 and lines[-1] == "images: a message"


def test_a_terminal_shows_bars_that_are_gone_at_the_end(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    clock, terminal = Clock(), Terminal()
    progress = forty_of_a_hundred(terminal, clock)
    other = Progress("references", stream=terminal, clock=clock)
    progress.beside(other)
    other.begin(total=100, done=20, records_to_go=20, workers=1)
    clock.now += 1
    other.finished(1, {})
    progress.say("a message [with brackets]")
    progress.close()
    text = terminal.getvalue()
    assert "images: 40/100 shards, 0.952 records/s" in text
    assert "references: 21/100 shards, 1 records/s, 19 s to go" in text
    assert "images: a message [with brackets]\n" in text
    # The last thing written moves up over both bars and erases their lines.
    assert text.endswith("\x1b[1A\x1b[2K" * 2) and "\x1b[?25h" in text


def test_work_without_shards_is_spoken_of_seldom():
    clock, said = Clock(), []
    seldom = Throttle(said.append, 10, clock)
    for clock.now in range(25):
        seldom(f"at {clock.now}")
    assert said == ["at 10", "at 20"]


def test_durations_are_as_exact_as_they_are_worth():
    assert [duration(s) for s in (0, 45, 600, 11_100, 187_200)] == [
        "0 s",
        "45 s",
        "10 min",
        "3 h 05 min",
        "2 d 4 h",
    ]
