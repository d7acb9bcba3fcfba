from dataclasses import asdict

import pytest

from ovref.errors import StorageError
from ovref.storage.commits import Commit, StoredFile, json_bytes, marker_path, parse_marker

COMMIT = Commit(
    shard="000000",
    fingerprint="f" * 64,
    files={"tar": StoredFile(name="000000-0123.tar", sha256="0" * 64, size=7)},
    inputs=3,
    outputs=2,
    dropped={"größe": 1},
    dropped_parts={},
    seconds=0.5,
    attempt=1,
)


def test_a_marker_is_read_as_it_was_written():
    data = json_bytes(asdict(COMMIT))
    assert parse_marker(data, "here") == COMMIT and b"gr\xc3\xb6\xc3\x9fe" in data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "here is damaged"),
        (b"\xff", "here is damaged"),
        (b"[]", "here must hold a JSON object, found list"),
        (b"{}", "here is not a commit marker"),
        (b'{"files": []}', "here is not a commit marker"),
        (b'{"files": {"tar": {}}, "shard": "a"}', "here is not a commit marker"),
        (json_bytes({**asdict(COMMIT), "more": 1}), "here is not a commit marker"),
    ],
)
def test_what_is_no_marker_is_refused(data, message):
    with pytest.raises(StorageError, match=message):
        parse_marker(data, "here")


def test_a_marker_lies_in_its_folder():
    assert marker_path("000000") == "_commits/000000.json"
    for shard in ("", "..", "a/b", ".json", "a.b", "a" * 65, "a\n"):
        with pytest.raises(StorageError, match="a shard's name must be"):
            marker_path(shard)
