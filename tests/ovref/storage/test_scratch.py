import os
import signal
import subprocess
import sys
import time

import pytest

from ovref.storage import scratch
from ovref.storage.scratch import remove_abandoned, scratch_folder

CHILD = """
import sys, tempfile, time
from ovref.storage.scratch import scratch_folder

tempfile.tempdir = sys.argv[1]
folder = scratch_folder()
open(f"{folder.name}/fetched", "w").write("a shard")
print(folder.name, flush=True)
time.sleep(600)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_there_until_it_is_cleaned_up(temporary):
    before = len(os.listdir("/proc/self/fd"))
    with scratch_folder() as name:
        assert os.path.isdir(name) and os.path.dirname(name) == str(temporary)
    folder = scratch_folder()
    folder.cleanup()
    del folder
    assert list(temporary.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_a_killed_process_has_left_is_removed_and_nothing_else(temporary, monkeypatch):
    monkeypatch.setattr(scratch, "FRESH_SECONDS", 0)
    kept = [temporary / name for name in ("ovref-scratch-of-mine", "ovref-scratch-0123456", "out")]
    for path in kept:
        path.mkdir()
    (temporary / "ovref-scratch-01234567").write_text("a file")
    arguments = [sys.executable, "-c", CHILD, str(temporary)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        theirs = child.stdout.readline().strip()
        with scratch_folder() as ours:
            remove_abandoned()
            assert os.path.isdir(ours)
            assert os.listdir(theirs) == ["fetched"]
            child.send_signal(signal.SIGKILL)
            child.wait()
            remove_abandoned()
            assert os.path.isdir(ours)
            assert not os.path.exists(theirs)
    assert sorted(path.name for path in temporary.iterdir()) == sorted(
        ["ovref-scratch-01234567", *(path.name for path in kept)]
    )


def test_a_folder_that_is_just_being_made_is_left_alone(temporary):
    new = temporary / "ovref-scratch-abcdefgh"
    new.mkdir()
    remove_abandoned()
    assert new.exists()
    old = time.time() - 2 * scratch.FRESH_SECONDS
    os.utime(new, (old, old))
    remove_abandoned()
    assert not new.exists()


def test_the_folder_of_a_link_is_left_alone(temporary):
    (temporary / "mine").mkdir()
    (temporary / "mine" / "precious").touch()
    (temporary / "ovref-scratch-abcdefgh").symlink_to(temporary / "mine")
    old = time.time() - 2 * scratch.FRESH_SECONDS
    os.utime(temporary / "mine", (old, old))
    remove_abandoned()
    assert (temporary / "mine" / "precious").exists()


def test_no_locks_no_removal(temporary, monkeypatch):
    def without(descriptor, operation):
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", without)
    monkeypatch.setattr(scratch, "FRESH_SECONDS", 0)
    with scratch_folder() as name:
        remove_abandoned()
        assert os.path.isdir(name)
