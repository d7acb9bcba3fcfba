"""How fast the explorer answers over a collection of a million references.

    python tests/benchmarks/explore_million.py [--references 1000000] [--nouns 50000] [--chromium]

The collection is that of open_million.py (files of holes where no number matters), but its nouns
are as frequent as words are (the n-th has 1/n of the first one's references) and lie scattered over
all rows, as in a real collection; the references of the nouns that are asked for have embeddings.
The explorer runs as a process of its own; of each request the CPU seconds of that process and the
time on the clock are taken, and with --chromium the time until the first page can be used.
Writes results/explore_<references>.json.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from machine import commit

os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}

import httpx
import numpy as np
import psutil

from open_million import HERE, make
from ovref_inference.collection import format as fmt
from ovref_inference.vectors import l2_normalised

ASKED = 30
"""Nouns and references asked for, each once."""


def collection(folder: Path, references: int, nouns: int, width: int) -> list[int]:
    """Makes it; gives the numbers of the nouns whose references have embeddings."""
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, nouns + 1)
    drawn = rng.choice(nouns, references - nouns, p=shares / shares.sum())
    noun_of = rng.permutation(np.concatenate([np.arange(nouns), drawn]))
    make(folder, references, nouns, width, noun_of)
    ranks = np.unique(np.geomspace(1, nouns / 2, ASKED).astype(int)) - 1
    rows = np.flatnonzero(np.isin(noun_of, ranks))
    for role in ("visual", "textual"):
        vectors = np.load(folder / fmt.FILES[role], mmap_mode="r+")
        for start in range(0, len(rows), 8192):
            part = rows[start : start + 8192]
            made = rng.standard_normal((len(part), width), np.float32)
            made += 2 * np.sin(noun_of[part, None] * np.arange(1, width + 1))
            vectors[part] = l2_normalised(made)
        vectors.flush()
    return [int(rank) for rank in ranks]


class Asking:
    """Asks the explorer, and notes what it took."""

    def __init__(self, url: str, pid: int) -> None:
        base, _, _ = url.partition("/?")
        self.client, self.process = httpx.Client(base_url=base, timeout=600), psutil.Process(pid)
        self.client.get(url)
        self.took: dict[str, list[tuple[float, float]]] = {}

    def __call__(self, what: str, path: str, **options: object) -> dict:
        cpu, wall = self._cpu(), time.perf_counter()
        answer = self.client.request("POST" if options else "GET", path, **options)
        self.took.setdefault(what, []).append((self._cpu() - cpu, time.perf_counter() - wall))
        return answer.raise_for_status().json()

    def _cpu(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def report(self) -> dict[str, dict[str, float]]:
        found = {}
        for what, pairs in self.took.items():
            cpu, wall = np.array(pairs).T * 1000
            found[what] = {
                "requests": len(pairs), "cpu_ms_mean": round(cpu.mean(), 1),
                "wall_ms_median": round(float(np.median(wall)), 1),
                "wall_ms_max": round(wall.max(), 1),
            }  # fmt: skip
        return found


def ask(asking: Asking, ranks: list[int]) -> None:
    """What a person does: looks at the vocabulary, searches, opens nouns and references."""
    for start in range(0, 1000, 100):
        asking("vocabulary, 100 nouns", f"/api/nouns?order=count&start={start}&count=100")
    for text in ("noun 0", "42", "7", "99999", "un 01"):
        asking("search in the vocabulary", f"/api/nouns?order=count&text={text}&count=100")
    for rank in ranks:
        noun = f"noun {rank:06d}"
        page = f"/api/noun?noun={noun}&count=24"
        found = asking("gallery of a noun, first time", page)
        asking("gallery of a noun, again", page)
        asking("a reference", f"/api/reference/{found['references'][0]['id']}")
    for rank in ranks:
        asking("gallery, second page", f"/api/noun?noun=noun {rank:06d}&count=24&start=24")
    names = "\n".join(f"noun {number:06d}" for number in range(0, 17_100, 100))
    for _ in range(5):
        asking("coverage of 171 classes", "/api/coverage", content=names)


def usable(url: str) -> float:
    """Seconds until the first page shows its nouns and references in Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(120_000)
        began = time.perf_counter()
        page.goto(url)
        page.wait_for_selector(".tile")
        seconds = time.perf_counter() - began
        browser.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--references", type=int, default=1_000_000)
    parser.add_argument("--nouns", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--chromium", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ranks = collection(Path(scratch), options.references, options.nouns, options.width)
        command = [sys.executable, "-m", "ovref_pipelines.cli", "explore", scratch, "--no-browser"]
        began = time.perf_counter()
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            url = re.search(r"http://\S+", server.stderr.readline()).group()
            started = time.perf_counter() - began
            asking = Asking(url, server.pid)
            started_cpu = asking._cpu()
            page = [round(usable(url), 2) for _ in range(3)] if options.chromium else None
            ask(asking, ranks)
            memory = asking.process.memory_info().rss / 1e6
        finally:
            server.terminate()
            server.wait()
    report = {
        "date": date.today().isoformat(), "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "references": options.references, "nouns": options.nouns, "width": options.width,
        "start_cpu_s": round(started_cpu, 2), "start_wall_s": round(started, 2),
        "page_usable_wall_s": page, "resident_mb": round(memory), "requests": asking.report(),
    }  # fmt: skip
    path = HERE / "results" / f"explore_{options.references}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
