"""Near-duplicates among very many captions: bytes and CPU time a caption, and how many are found.

    python tests/benchmarks/captions_near.py --data ../shared/data --captions 100000 1000000

Captions are those of captions_million.py, whose nouns are known; every tenth is instead an earlier
one, of the last 10,000, with one word that is no noun exchanged, left out or added, as captions of
web pages repeat each other. `found` is the part of those whose similarity with a kept original is
at least 0.8 that is dropped; `exact` (up to 30,000 captions) is what comparing all pairs drops.
With `--nouns 1` a caption's first noun stands for all, so that very many captions have the same
nouns and fill the same slots. Each number of captions is measured in a process of its own.
Writes results/captions_near.json, or, with --nouns 1, results/captions_near_crowded.json.

    python tests/benchmarks/captions_near.py --data ../shared/data --coco

prints what is dropped of the 25,014 captions of COCO val2017 as they are.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from datetime import date
from itertools import islice
from pathlib import Path

from captions_million import WORDS, _nouns_of, _peak_mb, make
from machine import commit

HERE = Path(__file__).parent
SIMILARITY, AT_ONCE, EXACT_BELOW = 0.8, 5000, 30_001


def repeated(captions: Iterable[str], known: set[str]) -> Iterator[tuple[str, str]]:
    """Captions, and of those that nearly repeat an earlier one that one, or else nothing."""
    rng, recent = random.Random(1), deque[str](maxlen=10_000)
    fillers = ("very", "nice", "old", "big", "some", "photo", "here", "now", "really", "picture")
    for number, caption in enumerate(captions):
        if number % 10 != 9:
            recent.append(caption)
            yield caption, ""
            continue
        original = recent[rng.randrange(len(recent))]
        words = original.split()
        others = [place for place, word in enumerate(words) if word.strip(".,") not in known]
        place = rng.choice(others) if others else len(words)
        words[place : place + rng.randrange(2)] = rng.choice(((), (rng.choice(fillers),)))
        yield " ".join(words), original


def similarity(one: str, other: str) -> float:
    a, b = (set(re.findall(r"\w+", text.lower())) for text in (one, other))
    return len(a & b) / max(1, len(a | b))


def run(path: Path, count: int, nouns: int, known: set[str]) -> dict:
    from ovref.ops.near_captions import NearCaptions

    before, began = _peak_mb(), time.process_time()
    near = NearCaptions(count, SIMILARITY)
    kept: set[int] = set()
    spent = time.process_time() - began
    dropped, due, found, pairs = 0, 0, 0, []
    with open(path, encoding="utf-8") as file:
        stream = repeated((line.strip() for line in file), known)
        while part := list(islice(stream, AT_ONCE)):
            texts = [text for text, _ in part]
            of_each = [[w for w in WORDS.findall(text) if w in known][:nouns] for text in texts]
            began = time.process_time()
            verdicts = []
            for sketch in near.sketches(texts, of_each):
                verdicts.append(near.has(sketch))
                if not verdicts[-1]:
                    near.add(sketch)
            spent += time.process_time() - began
            dropped += sum(verdicts)
            for (text, original), has, mine in zip(part, verdicts, of_each, strict=True):
                if not has and count <= 1_000_000:
                    kept.add(hash(text))
                if original and similarity(text, original) >= SIMILARITY:
                    theirs = [w for w in WORDS.findall(original) if w in known][:nouns]
                    if set(theirs) == set(mine) and (not kept or hash(original) in kept):
                        due, found = due + 1, found + has
                if count < EXACT_BELOW:
                    pairs.append((text, frozenset(mine)))
    arrays = (near._slots, near._nouns, near._starts, near._words)
    report = {
        "captions": count, "dropped": dropped, "due": due, "found": round(found / max(1, due), 4),
        "us_a_caption": round(1e6 * spent / count, 1),
        "bytes_a_caption": round(sum(len(a) * a.itemsize for a in arrays) / count, 1),
        "peak_rss_mb": _peak_mb(), "rss_mb_before": before,
    }  # fmt: skip
    return report | ({"exact": exact(pairs)} if pairs else {})


def exact(pairs: list[tuple[str, frozenset[str]]], least: float = SIMILARITY) -> int:
    """How many captions comparing every pair drops."""
    kept: dict[frozenset[str], list[set[str]]] = defaultdict(list)
    dropped = 0
    for text, nouns in pairs:
        words = set(re.findall(r"\w+", text.lower()))
        if any(len(words & other) >= least * len(words | other) for other in kept[nouns]):
            dropped += 1
        else:
            kept[nouns].append(words)
    return dropped


def coco(texts: list[str], known: set[str]) -> None:
    from ovref.ops.near_captions import NearCaptions

    texts = list(dict.fromkeys(texts))
    nouns = [[w for w in WORDS.findall(text.lower()) if w in known] for text in texts]
    print(f"similarity | dropped of {len(texts)} | by comparing all pairs")
    for least in (0.9, 0.8, 0.7, 0.6, 0.5):
        near, dropped = NearCaptions(len(texts), least), 0
        for sketch in near.sketches(texts, nouns):
            if near.has(sketch):
                dropped += 1
            else:
                near.add(sketch)
        pairs = [(text, frozenset(of)) for text, of in zip(texts, nouns, strict=True)]
        print(least, dropped, exact(pairs, least), sep=" | ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with coco/")
    parser.add_argument("--captions", type=int, nargs="+", default=[30_000, 100_000, 1_000_000])
    parser.add_argument("--nouns", type=int, default=100, help="that count, the first ones")
    parser.add_argument("--coco", action="store_true")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    found = json.loads((arguments.data / "coco" / "captions_val2017.json").read_text())
    texts = [" ".join(item["caption"].split()) for item in found["annotations"]]
    known = _nouns_of(texts)
    if arguments.coco:
        coco(texts, known)
        return
    if arguments.only:
        (count,) = arguments.captions
        print(json.dumps(run(arguments.only, count, arguments.nouns, known)))
        return
    report = {
        "date": date.today().isoformat(), "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "similarity": SIMILARITY,
        "nouns": arguments.nouns, "runs": [],
    }  # fmt: skip
    name = "captions_near.json" if arguments.nouns > 1 else "captions_near_crowded.json"
    for count in arguments.captions:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "captions.txt")
            make(arguments.data, count, path)
            command = [
                sys.executable, __file__, "--data", str(arguments.data), "--captions", str(count),
                "--nouns", str(arguments.nouns), "--only", str(path),
            ]  # fmt: skip
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        report["runs"].append(json.loads(output.splitlines()[-1]))
        (HERE / "results" / name).write_text(json.dumps(report, indent=1) + "\n")
        print(output, end="", flush=True)


if __name__ == "__main__":
    main()
