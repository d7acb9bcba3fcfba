"""What steps over very many captions keep in memory from one shard to the next.

    python tests/benchmarks/captions_state.py --data ../shared/data --captions 1000000 10000000

Two parts, each in a process of its own. `read`: two text files, one with twice the weight of the
other, are read as one corpus, and captions whose key was seen before are dropped, as `ovref.ingest`
does. `choose`: of prompts with known nouns, those are chosen that a cap of each noun and
near-duplicates leave, and rare nouns come first, as `ovref.select_prompts` does. Neither writes
shards, which is work of each shard alone (`captions_million.py` measures all of it). Captions are
COCO's of val2017 with their nouns exchanged for others, as often as COCO has them; a twentieth is
said twice, a tenth repeats one of the last 10,000 with a word added. Peaks of memory are those of
the process after each tenth of the captions. Writes results/captions_state.json.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from captions_million import MAX_PER_NOUN, SHARD_SIZE, WORDS, _nouns_of, _peak_mb
from machine import commit, resident_mb

HERE = Path(__file__).parent
FILLERS = ("very ", "nice ", "old ", "big ", "some ", "photo ", "here ", "now ", "really ")
SIMILARITY = 0.8


def drawn(data: Path, count: int) -> Iterator[tuple[str, list[str]]]:
    """Captions and their nouns."""
    found = json.loads((data / "coco" / "captions_val2017.json").read_text())["annotations"]
    texts = [" ".join(item["caption"].split()).lower() for item in found]
    known, often = _nouns_of(texts), Counter[str]()
    templates = []
    for text in texts:
        matches = [word for word in WORDS.finditer(text) if word[0] in known]
        often.update(word[0] for word in matches)
        ends = [0, *(word.end() for word in matches)]
        starts = [*(word.start() for word in matches), len(text)]
        templates.append([text[a:b] for a, b in zip(ends, starts, strict=True)])
    nouns = np.array(list(often))
    chances = np.array(list(often.values())) / often.total()
    rng, python = np.random.default_rng(0), random.Random(0)
    recent = deque[tuple[list[str], list[str]]](maxlen=10_000)
    pool: Iterator[str] = iter(())
    last = ("", [])
    for number in range(count):
        if number % 20 == 19:
            yield last
            continue
        if number % 10 == 4 and recent:
            pieces, of = recent[python.randrange(len(recent))]
            pieces = [*pieces]
            pieces[python.randrange(len(pieces))] += python.choice(FILLERS)
        else:
            pieces, of = templates[python.randrange(len(templates))], []
            for _ in pieces[1:]:
                if (noun := next(pool, None)) is None:
                    pool = iter(rng.choice(nouns, 1 << 16, p=chances).tolist())
                    noun = next(pool)
                of.append(noun)
            recent.append((pieces, of))
        last = (pieces[0] + "".join(a + b for a, b in zip(of, pieces[1:], strict=True)), of)
        yield last


class Watch:
    """Memory of this process after each tenth of the work."""

    def __init__(self, count: int) -> None:
        self.before, self._count, self.peaks = resident_mb(), count, []
        Path("/proc/self/clear_refs").write_text("5")  # peaks are of what follows
        self._began = time.process_time()

    def at(self, number: int) -> None:
        if number * 10 // self._count > len(self.peaks):
            self.peaks.append(_peak_mb())

    def found(self, **more: Any) -> dict[str, Any]:
        spent = time.process_time() - self._began
        return {
            "rss_mb_before": round(self.before, 1), "peak_mb_after_each_tenth": self.peaks,
            "bytes_a_caption": round(1e6 * (_peak_mb() - self.before) / self._count, 1),
            "cpu_s": round(spent, 1), "us_a_caption": round(1e6 * spent / self._count, 1), **more,
        }  # fmt: skip


def read(folder: Path, data: Path, count: int) -> dict[str, Any]:
    from ovref.contract import Dropped
    from ovref.corpora import CorpusSpec, read_captions
    from ovref.ingest import first_of_each_key

    with open(folder / "a.txt", "w") as a, open(folder / "b.txt", "w") as b:
        for number, (text, _) in enumerate(drawn(data, count)):
            (b if number % 3 == 2 else a).write(text + "\n")
    (folder / "both.yaml").write_text("corpora: [{path: a.txt, weight: 2}, {path: b.txt}]\n")
    spec = CorpusSpec(path=str(folder / "both.yaml"))
    next(first_of_each_key(read_captions(spec)))  # imports
    watch, kept = Watch(count), 0
    for number, item in enumerate(first_of_each_key(read_captions(spec)), start=1):
        kept += not isinstance(item, Dropped)
        watch.at(number)
    return watch.found(kept=kept)


def choose(folder: Path, data: Path, count: int) -> dict[str, Any]:
    from ovref import select_prompts

    step = prompts(folder, data, count)
    shards, table = step.complete(), type(step).table
    spec = select_prompts.SelectPrompts(
        max_per_noun=MAX_PER_NOUN, order="rare_first", near_duplicates=SIMILARITY
    )
    watch, at = Watch(count), [0]

    def watched(*arguments: Any) -> Any:
        watch.at(at[0] * SHARD_SIZE)
        at[0] += 1
        return table(*arguments)

    type(step).table = watched
    choice = select_prompts._choose(spec, step, shards)
    order = select_prompts._rare_first(choice)
    watch.at(count)
    dropped = Counter[str]()
    for reasons in choice.dropped.values():
        dropped.update({reason: len(numbers) for reason, numbers in reasons.items()})
    return watch.found(
        dropped=dict(dropped), kept=sum(choice.kept.values()), first=order[:3], shards=len(order)
    )


def prompts(folder: Path, data: Path, count: int) -> Any:
    """A finished step of prompts, of which there are tables alone."""
    import pyarrow as pa

    from ovref.storage.codec import COLUMNS, NOUN
    from ovref.storage.file_store import Store
    from ovref.storage.shards import TableFile
    from ovref.storage.steps import open_step

    schema = pa.schema(list(COLUMNS["prompt"].items()))
    step = open_step(Store.open(str(folder)), "prompts", {"of": "captions_state"})
    stream, names = drawn(data, count), []
    while some := list(islice(stream, SHARD_SIZE)):
        words = [word for _, of in some for word in of]
        zeros = pa.array(np.zeros(len(words), np.int32))
        offsets = pa.array(np.cumsum([0, *(len(of) for _, of in some)]).astype(np.int32))
        of_all = pa.StructArray.from_arrays([pa.array(words), zeros, zeros], fields=list(NOUN))
        n, first = len(some), len(names) * SHARD_SIZE
        columns = {
            "key": pa.array([f"{number:024x}" for number in range(first, first + n)]),
            "caption": pa.array([text for text, _ in some]),
            "nouns": pa.ListArray.from_arrays(offsets, of_all),
            "source": pa.array([""] * n), "draw": pa.array(np.zeros(n, np.int32)),
        }  # fmt: skip
        names.append(f"{len(names):06d}")
        with TableFile(schema) as file:
            file.write(pa.table(columns).select(schema.names).cast(schema))
            step.publish(names[-1], file, inputs=n)
    step.finish(names)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with coco/")
    parser.add_argument("--captions", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--parts", nargs="+", default=["read", "choose"])
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        part, folder, count = arguments.only
        found = {"read": read, "choose": choose}[part](Path(folder), arguments.data, int(count))
        print(json.dumps(found))
        return
    path = HERE / "results" / "captions_state.json"
    for count in arguments.captions:
        for part in arguments.parts:
            with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
                command = [sys.executable, __file__, "--data", str(arguments.data)]
                output = subprocess.run(
                    [*command, "--only", part, folder, str(count)],
                    check=True, stdout=subprocess.PIPE, text=True,
                ).stdout  # fmt: skip
            report = json.loads(path.read_text()) if path.exists() else {"runs": {}}
            report |= {
                "date": date.today().isoformat(), "commit": commit(), "shard_size": SHARD_SIZE,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "max_per_noun": MAX_PER_NOUN, "near_duplicates": SIMILARITY,
            }  # fmt: skip
            report["runs"].setdefault(str(count), {})[part] = json.loads(output)
            path.write_text(json.dumps(report, indent=1) + "\n")
            print(count, part, output, flush=True)


if __name__ == "__main__":
    main()
