"""Compares two outputs of `ovref build`, byte for byte.

    python tests/benchmarks/compare_builds.py OLD NEW
    python tests/benchmarks/compare_builds.py --before REVISION [--captions 24]

The second form makes the two outputs itself: it builds the first captions of the demo's
configuration with the code of a revision (in a temporary git worktree) and with the code of this
checkout, one process each. A shallow clone lacks the history that an older revision needs.

Prints one line for each file that differs or exists on one side only; for a shard's samples, the
members of the tar that differ. Exits with 1 if anything differs. What holds times or absolute paths
(`UNCOMPARED`, and the `seconds` and `attempt` of a commit marker) is not compared.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/miniature_fast.yaml"
UNCOMPARED = {"build.json", "progress.json", "report.json", "reports", "_reduce", "_probe"}
"""Files and folders of an output that hold times, absolute paths, or work files."""
UNCOMPARED_FIELDS = ("seconds", "attempt")
"""Fields of a commit marker that say how a shard was made, not what it holds."""
SHARD_HASH = re.compile(r"(?<=\d)-[0-9a-f]{16}(?=\.(tar|parquet)$)")
"""The hash in a shard's file name: left out, so that the two versions of a shard are compared."""
MOST_MEMBERS = 5
"""Members of a tar that are named in one line."""


def differences(old: Path, new: Path) -> list[str]:
    """One line for each file that differs between two outputs or is missing in one of them."""
    left, right = _files(old), _files(new)
    found = [f"only in {old}: {name}" for name in sorted(left.keys() - right.keys())]
    found += [f"only in {new}: {name}" for name in sorted(right.keys() - left.keys())]
    for name in sorted(left.keys() & right.keys()):
        if _digest(name, left[name]) == _digest(name, right[name]):
            continue
        members = _members(left[name], right[name]) if name.endswith(".tar") else ""
        found.append(f"differs: {name}{members}")
    return found


def compared(output: Path) -> int:
    """How many files of an output are compared."""
    return len(_files(output))


def _files(output: Path) -> dict[str, Path]:
    """The compared files of an output by their names, without the hashes in the names of shards."""
    found = {}
    for path in output.rglob("*"):
        inside = path.relative_to(output)
        if path.is_file() and inside.parts[0] not in UNCOMPARED:
            found[SHARD_HASH.sub("", inside.as_posix())] = path
    if not found:
        raise SystemExit(f"{output} is not the output of a build: it holds nothing to compare")
    return found


def _digest(name: str, path: Path) -> str:
    content = path.read_bytes()
    if "/_commits/" in name:
        marker = json.loads(content)
        content = json.dumps(
            {key: value for key, value in marker.items() if key not in UNCOMPARED_FIELDS}
        ).encode()
    return hashlib.sha256(content).hexdigest()


def _members(old: Path, new: Path) -> str:
    """The members that differ between two tars, in brackets."""
    left, right = dict(_contents(old)), dict(_contents(new))
    names = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    if not names:
        return " (the same members in another order or with other headers)"
    rest = f" and {len(names) - MOST_MEMBERS} more" if len(names) > MOST_MEMBERS else ""
    return f" ({', '.join(names[:MOST_MEMBERS])}{rest})"


def _contents(path: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            yield member.name, hashlib.sha256(file.read() if file else b"").hexdigest()


def build_with(code: Path, captions: int, output: Path) -> None:
    """Builds the first captions of the demo's configuration with the code of a checkout."""
    paths = os.pathsep.join(str(code / part) for part in (".", "inference", "pipelines"))
    settings = (f"corpus.limit={captions}", "engine.engine=local", "engine.workers=1")
    subprocess.run(
        [sys.executable, "-m", "ovref_pipelines", "build", "--config", code / CONFIG,
         f"output={output}", *settings],
        cwd=code, env={**os.environ, "PYTHONPATH": paths}, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def build_both(revision: str, captions: int, folder: Path) -> tuple[Path, Path]:
    """Builds with a revision's code and with this checkout's; returns the two outputs."""
    git = ("git", "-C", str(ROOT), "worktree")
    before = folder / "code"
    subprocess.run([*git, "add", "--quiet", "--detach", before, revision], check=True)
    try:
        build_with(before, captions, folder / "old")
    finally:
        subprocess.run([*git, "remove", "--force", before], check=True)
    build_with(ROOT, captions, folder / "new")
    return folder / "old", folder / "new"


def report(old: Path, new: Path) -> int:
    """Prints the differences of two outputs; returns the exit code."""
    found = differences(old, new)
    print("\n".join(found) or f"{compared(new)} files compared: no byte differs")
    return 1 if found else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("outputs", nargs="*", type=Path, metavar="OUTPUT", help="OLD and NEW")
    parser.add_argument("--before", metavar="REVISION", help="build both, the first with this code")
    parser.add_argument("--captions", type=int, default=24, help="default: 24")
    options = parser.parse_args(arguments)
    if options.before is None:
        if len(options.outputs) != 2:
            parser.error("give the two outputs to compare, or --before REVISION")
        return report(*options.outputs)
    if options.outputs:
        parser.error("--before builds both outputs: give it without outputs")
    with tempfile.TemporaryDirectory() as folder:
        return report(*build_both(options.before, options.captions, Path(folder)))


if __name__ == "__main__":
    raise SystemExit(main())
