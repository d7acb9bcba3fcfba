"""The progress line: correct rates and times."""

import io
import json
import threading

from ovref_pipelines.engine.bill import Bill
from ovref_pipelines.engine.progress import Progress, Throttle, duration
from ovref_pipelines.engine.reports import Report


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def begun(clock, records=400, stream=None, **options):
    progress = Progress("images", stream=stream or io.StringIO(), clock=clock, **options)
    progress.begin(total=10, done=6, records_to_go=records, workers=1, records_done=600)
    return progress


def test_no_estimate_before_the_first_batch_and_what_was_done_before_does_not_count():
    clock = Clock()
    progress = begun(clock)
    assert progress.line() == "images: 600/1000 records, workers are loading their models"
    clock.now = 100
    progress.working(1)
    unknown = "time to go unknown until the first batch is finished"
    assert progress.line() == f"images: 600/1000 records, {unknown}"
    clock.now = 110
    progress.report(Report(shard="6", done=50, dropped=1))
    assert progress.line() == "images: 650/1000 records, 5 records/s, 70 s to go, 1 drops"
    clock.now = 120
    progress.finished("6", 100, {"no_nouns": 3})
    assert progress.line() == "images: 700/1000 records, 5 records/s, 60 s to go, 3 drops"


def test_what_a_lost_worker_had_done_is_not_done():
    clock = Clock()
    progress = begun(clock)
    clock.now = 10
    progress.report(Report(shard="6", done=40, dropped=0))
    progress.report(Report(shard="7", done=10, dropped=0))
    clock.now = 20
    progress.lost("6")
    assert progress.line() == "images: 610/1000 records, 0.5 records/s, 13 min to go"
    progress.quarantined("7", 100)
    assert progress.counts()["records_to_go"] == 300 and progress.counts()["records"] == 900


def test_nobody_knows_the_end_while_shards_of_the_step_before_are_to_come():
    progress = begun(Clock())
    progress.expect_shards(2)
    assert progress.line() == "images: 600/? records"
    assert progress.counts()["seconds_to_go"] is None


def test_gpus_and_cost_are_told():
    clock = Clock()
    bill = Bill(3.0, of_gpus=True, clock=clock)
    progress = begun(clock, bill=bill)
    bill.holds(workers=2, gpus=2)
    clock.now = 1800
    gpu = {"gpu_total_bytes": 80 * 10**9}
    progress.report(Report(shard="6", done=4, dropped=0, gpu_used_bytes=10**10, gpu_busy=1, **gpu))
    progress.report(Report(shard="7", done=4, dropped=0, gpu_used_bytes=2 * 10**10, **gpu))
    assert progress.line().endswith("GPU 100% busy, 20 of 80 GB, cost so far 3.00")
    assert progress.counts()["gpu"] == {
        "used_bytes": 2 * 10**10, "total_bytes": 80 * 10**9, "busy": 1.0,
    }  # fmt: skip


def test_who_holds_no_gpus_pays_nothing_where_gpus_are_paid_for():
    clock = Clock()
    of_gpus = Bill(3600.0, of_gpus=True, clock=clock)
    of_workers = Bill(3600.0, of_gpus=False, clock=clock)
    for bill in (of_gpus, of_workers):
        bill.holds(workers=4, gpus=0)
    clock.now = 10
    assert (of_gpus.amount, of_workers.amount) == (0.0, 40.0)
    of_workers.holds(0, 0)
    clock.now = 100
    assert of_workers.amount == 40.0 and Bill(None, of_gpus=False).amount is None


def test_a_watcher_and_json_get_plain_values():
    clock, log, seen = Clock(), io.StringIO(), []
    progress = begun(clock, stream=log, log="json", watcher=seen.append)
    clock.now = 10
    progress.report(Report(shard="6", done=40, dropped=0))
    progress.close()
    (told,) = [json.loads(line) for line in log.getvalue().splitlines() if "640/" in line]
    assert told["records_done"] == 640 and told["records_per_second"] == 4.0
    assert told["seconds_to_go"] == 90.0 and json.loads(json.dumps(seen[-1])) == seen[-1]
    assert {key: told[key] for key in seen[-1][0]} == seen[-1][0]


def test_quarantined_shards_are_shown_and_not_waited_for():
    clock = Clock()
    progress = Progress("images", stream=io.StringIO(), clock=clock)
    progress.begin(total=3, done=0, records_to_go=30, workers=1)
    clock.now = 1
    progress.finished("0", 10, {})
    progress.quarantined("1", 10)
    assert progress.line() == "images: 10/20 records, 10 records/s, 1 s to go, 1 shards quarantined"


def forty_of_a_hundred(stream, clock):
    progress = Progress("images", stream=stream, every_seconds=10, clock=clock)
    progress.begin(total=100, done=0, records_to_go=100, workers=1)
    for _ in range(40):
        clock.now += 1
        progress.finished("0", 1, {})
    return progress


def test_a_log_gets_a_line_every_so_often():
    log = io.StringIO()
    progress = forty_of_a_hundred(log, Clock())
    progress.say("a message")
    progress.close()
    lines = log.getvalue().splitlines()
    assert lines[1] == "images: 10/100 records, 1 records/s, 2 min to go"
    assert len(lines) == 6 and lines[-1] == "images: a message"


def test_a_terminal_shows_bars_that_are_gone_at_the_end(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    clock, terminal = Clock(), Terminal()
    progress = forty_of_a_hundred(terminal, clock)
    other = Progress("references", stream=terminal, clock=clock)
    progress.show_with(other)
    other.begin(total=100, done=20, records_to_go=20, workers=1)
    clock.now += 1
    other.finished("0", 1, {})
    progress.say("a message [with brackets]")
    progress.close()
    text = terminal.getvalue()
    assert "images: 40/100 records, 1 records/s" in text
    assert "references: 1/20 records, 1 records/s, 19 s to go" in text
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


def test_what_is_told_of_a_build_is_written_while_others_report():
    """A store that is slow to write holds up nobody but who writes."""
    writing, go_on = threading.Event(), threading.Event()

    def watcher(counts):
        if threading.current_thread() is not threading.main_thread():
            writing.set()
            assert go_on.wait(30)

    progress = begun(Clock(), watcher=watcher)
    slow = threading.Thread(target=progress.tick)
    slow.start()
    assert writing.wait(30)
    before = progress.counts()["records_done"]
    progress.report(Report(shard="00000", done=3, dropped=0))
    progress.finished("00000", 10, {})
    assert slow.is_alive() and progress.counts()["records_done"] == before + 10
    go_on.set()
    slow.join()
