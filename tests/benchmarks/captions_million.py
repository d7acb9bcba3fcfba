"""Very many captions through ingest, nouns and the selection of prompts: does memory stay flat?

    python tests/benchmarks/captions_million.py --data ../shared/data --captions 100000 1000000

Captions are COCO's of val2017, their nouns exchanged for others of the same captions at random, so
that nearly all are distinct; a twentieth is said twice. Each number of captions goes through the
three steps in a process of its own, whose CPU seconds and peak resident memory are recorded for
every step. `--without-nouns` skips the tagger, which takes most of the time and hides the memory of
the others, and takes the first words of a caption for its nouns.
Writes results/captions.json, or results/captions_without_tagger.json.

`--coverage` instead prints how many nouns of COCO's captions, as they are, a build has seen after a
part of its shards, in the order of the corpus and with `order=rare_first`.
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
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from machine import commit

HERE = Path(__file__).parent
SHARD_SIZE = 5000
MAX_PER_NOUN = 2000
WORDS = re.compile(r"[a-z]+")


def make(data: Path, count: int, path: Path) -> None:
    """Writes `count` captions, one a line."""
    found = json.loads((data / "coco" / "captions_val2017.json").read_text())["annotations"]
    texts = [" ".join(item["caption"].split()) for item in found]
    nouns = sorted(_nouns_of(texts))
    known, rng, last = set(nouns), random.Random(0), ""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            if number % 20 == 19:
                file.write(last)
                continue
            text = texts[rng.randrange(len(texts))].lower()
            last = WORDS.sub(lambda word: rng.choice(nouns) if word[0] in known else word[0], text)
            last += "\n"
            file.write(last)


def _nouns_of(texts: list[str]) -> set[str]:
    """Words that follow an article at least three times: mostly nouns, which is enough here."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in re.findall(r"\b(?:a|an|the) ([a-z]{3,})\b", text.lower()):
            counts[word] = counts.get(word, 0) + 1
    return {word for word, count in counts.items() if count >= 3}


def run(captions: Path, folder: Path, with_nouns: bool, order: str) -> list[dict]:
    """Peak memory and CPU seconds after each step."""
    from ovref.corpora import CorpusSpec, identify, read_captions
    from ovref.ingest import ingest
    from ovref.run_shard import run_shard
    from ovref.select_prompts import SelectPrompts, select_prompts
    from ovref.stages.extract_nouns import ExtractNouns
    from ovref.storage.file_store import Store
    from ovref.storage.steps import open_step

    store, report = Store.open(str(folder)), []
    spec = CorpusSpec(path=str(captions), corpus_id="many")

    def note(step: str, folder, began: float) -> None:
        commits = folder.commits().values()
        report.append({
            "step": step, "records": sum(commit.outputs for commit in commits),
            "cpu_s": round(time.process_time() - began, 2),
            "peak_rss_mb": _peak_mb(),
        })  # fmt: skip
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the next step is its own

    began = time.process_time()
    cut = open_step(store, "captions", {"corpus": identify(spec)})
    ingest(read_captions(spec), cut, SHARD_SIZE)
    note("captions", cut, began)

    began = time.process_time()
    prompts = open_step(store, "prompts", {"nouns": with_nouns}, [cut.fingerprint])
    stage = ExtractNouns().build() if with_nouns else _words_as_nouns
    for shard in cut.complete():
        run_shard([stage], cut, prompts, shard)
    prompts.finish(cut.complete())
    note("prompts" if with_nouns else "prompts without the tagger", prompts, began)

    began = time.process_time()
    selected = open_step(store, "selected", {"order": order}, [prompts.fingerprint])
    select_prompts(SelectPrompts(max_per_noun=MAX_PER_NOUN, order=order), prompts, selected)
    note(f"selected, {order}", selected, began)
    return report


def coverage(data: Path, folder: Path) -> None:
    """Prints a row for each size of shards and part of them."""
    from ovref.records import Noun, Prompt
    from ovref.select_prompts import SelectPrompts, select_prompts
    from ovref.storage.file_store import Store
    from ovref.storage.steps import open_step

    found = json.loads((data / "coco" / "captions_val2017.json").read_text())["annotations"]
    texts = [" ".join(item["caption"].split()).lower() for item in found]
    known, prompts = _nouns_of(texts), []
    for number, text in enumerate(texts):
        nouns = [Noun(text=w[0], start=w.start(), end=w.end()) for w in WORDS.finditer(text)]
        nouns = [noun for noun in nouns if noun.text in known]
        prompts.append(Prompt(key=f"k{number}", caption=text, nouns=tuple(nouns), source=""))
    print("shard size | part of the shards | nouns, corpus | nouns, rare_first | of")
    for size in (16, 64, 256):
        store, shards = Store.open(str(folder / str(size))), {}
        step = open_step(store, "prompts", {})
        for start in range(0, len(prompts), size):
            shards[f"{start // size:06d}"] = prompts[start : start + size]
        for shard, some in shards.items():
            step.commit(shard, some, inputs=len(some))
        step.finish(list(shards))
        nouns_of = {shard: [n for p in some for n in p.nouns] for shard, some in shards.items()}
        target = open_step(store, "selected", {}, [step.fingerprint])
        select_prompts(SelectPrompts(order="rare_first"), step, target)
        for part in (0.05, 0.1, 0.25, 0.5):
            counts = [
                len({n.text for s in order[: round(part * len(order))] for n in nouns_of[s]})
                for order in (list(shards), target.complete())
            ]
            print(size, part, *counts, len(known), sep=" | ")


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return round(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024, 1)


def _words_as_nouns(captions: Iterator) -> Iterator:
    from ovref.records import Noun, Prompt

    for caption in captions:
        words = [w for w in WORDS.finditer(caption.text) if len(w[0]) > 3]
        nouns = tuple(Noun(text=w[0], start=w.start(), end=w.end()) for w in words[:4])
        yield Prompt(
            key=caption.key, caption=caption.text, nouns=nouns or (Noun(text="x", start=0, end=1),),
            source=caption.source,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with coco/")
    parser.add_argument("--captions", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--order", default="rare_first")
    parser.add_argument("--without-nouns", action="store_true")
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        folder = arguments.only / "steps"
        found = run(
            arguments.only / "captions.txt", folder, not arguments.without_nouns, arguments.order
        )
        print(json.dumps(found))
        return
    if arguments.coverage:
        with tempfile.TemporaryDirectory() as scratch:
            coverage(arguments.data, Path(scratch))
        return
    report = {
        "date": date.today().isoformat(), "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "order": arguments.order,
        "shard_size": SHARD_SIZE, "max_per_noun": MAX_PER_NOUN, "runs": {},
    }  # fmt: skip
    for count in arguments.captions:
        with tempfile.TemporaryDirectory() as scratch:
            make(arguments.data, count, Path(scratch, "captions.txt"))
            command = [sys.executable, __file__, *sys.argv[1:], "--only", scratch]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            report["runs"][count] = json.loads(output.splitlines()[-1])
    name = "captions_without_tagger.json" if arguments.without_nouns else "captions.json"
    path = HERE / "results" / name
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
