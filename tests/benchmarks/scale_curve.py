"""CPU of reductions against their number of references: measured, fitted, and as `ovref build
--dry-run` estimates it for more.

    python tests/benchmarks/scale_curve.py

Reads results/reduce_partitioned_*x768.json, prints the tables of docs/guides/scale.md, and draws
docs/scale.svg. Prices are those of large clouds in 2026, rounded, and no part of ovref.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ovref.reduce.cost import work_of
from ovref.storage.shards import ROW_GROUP

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
SIDES = ("undivided", "partitioned")
CORE_HOUR, MILLION_REQUESTS, GB_MONTH = 0.04, 0.4, 0.023
NOUN_SECONDS = 0.02
PLANNED = ((100_000_000, 436_000), (1_000_000_000, 1_740_000))
"""References, and nouns by Heaps' law from COCO's captions (`VOCABULARY_GROWTH`)."""
PARTITION, WIDTH = 1_000_000, 768


def measured() -> dict[str, list[tuple[int, float]]]:
    """References and CPU seconds of each side."""
    found: dict[str, list[tuple[int, float]]] = {side: [] for side in SIDES}
    for path in HERE.glob("results/reduce_partitioned_*x768.json"):
        report = json.loads(path.read_text())
        for side in SIDES:
            if side in report:
                found[side].append((report["references"], report[side]["cpu_s"]))
    return {side: sorted(points) for side, points in found.items()}


def exponent(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Slope and intercept of log CPU over log references."""
    slope, intercept = np.polyfit(*np.log(np.array(points)).T, 1)
    return float(slope), float(intercept)


def bytes_of(references: float, nouns: float) -> float:
    """Bytes of a collection in float16, as `ovref_pipelines.verbs.estimate` has them."""
    return references * (4 * 2 * WIDTH + 150) + nouns * (20 + 4) * WIDTH


def main() -> None:
    found = measured()
    print("| references | undivided, CPU s | in partitions, CPU s |")
    for n in sorted({n for points in found.values() for n, _ in points}):
        cells = [dict(found[side]).get(n) for side in SIDES]
        print(n, *(f"{cpu:.0f}" if cpu else "" for cpu in cells), sep=" | ")
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for side, mark in zip(SIDES, "so", strict=True):
        slope, _ = exponent(found[side])
        print(f"{side}: CPU grows with the {slope:.2f}th power of the references")
        n, cpu = np.array(found[side]).T
        axes.plot(n, cpu / 3600, mark, label=f"{side}, measured (power {slope:.2f})")
    print("references | nouns | CPU h | of these alone | requests | TB | money, storage a month")
    sizes = np.geomspace(2e4, 1e9, 40)
    hours = []
    for n in sizes:
        work = _work(n, PLANNED[0][1] * (n / PLANNED[0][0]) ** 0.6)
        hours.append((work.worker_seconds + work.driver_seconds) / 3600)
    axes.plot(sizes, hours, "-", color="grey", label="in partitions, estimated")
    for n, nouns in PLANNED:
        work, stored = _work(n, nouns), bytes_of(n, nouns)
        total = (work.worker_seconds + work.driver_seconds) / 3600
        money = total * CORE_HOUR + work.requests / 1e6 * MILLION_REQUESTS
        print(
            n, nouns, f"{total:.0f}", f"{work.driver_seconds / 3600:.2f}", f"{work.requests:.2g}",
            f"{stored / 1e12:.2f}", f"{money:.0f}, {stored / 1e9 * GB_MONTH:.0f}", sep=" | ",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="references", ylabel="CPU hours")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = "scale"
    figure.savefig(DOCS / "scale.svg", metadata={"Date": None})


def _work(references: float, nouns: float):
    return work_of(
        references=references, nouns=nouns, shards=references / ROW_GROUP, visual=WIDTH,
        textual=WIDTH, noun_seconds=NOUN_SECONDS, most=PARTITION,
    )  # fmt: skip


if __name__ == "__main__":
    main()
