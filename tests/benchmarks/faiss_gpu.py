"""Training and filling an inverted file with faiss on a GPU, against faiss and ovref on the CPU.

    OMP_NUM_THREADS=16 OPENBLAS_NUM_THREADS=16 PYTHONPATH=. \\
        python tests/benchmarks/faiss_gpu.py --output OUT

Rows are float32 unit vectors in clusters (nouns in topics, with ways to look, as in
reduce_million.py), rounded to float16 as a collection stores them. The index and its training
sample are those that ovref chooses for so many rows. Measured, in this order:

    device     `ivf.train` as ovref has it where faiss sees a GPU: plain k-means over all lists, the
               assignment by a flat index on the GPU; then all rows added to the index on the GPU,
               from memory of the host, and the index taken back to the host
    two-level  `ivf.train` as ovref has it on a CPU: k-means into cells, then within each
    assign     `ivf.assign` as ovref has it on a CPU, over some rows
    add        the first `--cpu-rows` rows added by faiss on the CPU
    plain      the k-means of the first line by faiss on the CPU, `--cpu-steps` of its steps

The CPU's parts take as many threads as the two variables above say. Times are by the wall clock,
from and to memory of the host; of the device's several runs the median counts. Recall@10 is of
queries drawn with the rows and not stored, against exact search by torch; a row that scores no
worse than the tenth counts as found. Every figure is printed and saved as soon as it is known; what
would begin after `--budget` seconds is left out, and the report says so.

`--device cpu` runs the device's part with faiss on the CPU: a rehearsal, whose ratios mean nothing.
Writes faiss_gpu.json and faiss_gpu.md, with `_cpu` in the names for a rehearsal.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from machine import processor

# Before faiss, so that CUDA's libraries are loaded when faiss asks for them.
import torch  # isort: skip
import faiss
import numpy as np

from ovref.reduce import ivf
from ovref_inference.collection.index import choose_index, sample, training_rows

K, SEED, STEPS = 10, 0, 10
BLOCK = 131_072
"""Rows made or added at once: 400 MB at a width of 768."""
TIE = 1e-6


def main() -> None:
    arguments = _arguments()
    device = torch.device(arguments.device)
    gpu = device.type == "cuda"
    if gpu and not ivf.gpus():
        raise SystemExit("this build of faiss sees no GPU")
    report = Report(arguments, device)
    with torch.inference_mode():
        measure(report, arguments, device)
    report.write()
    print(report.table())


class Report:
    """Figures by name, saved after each."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        gpu = device.type == "cuda"
        self.began = time.perf_counter()
        self.budget = arguments.budget
        self.output = arguments.output
        self.name = "faiss_gpu" if gpu else "faiss_gpu_cpu"
        self.figures: dict[str, Any] = {
            "what": "An inverted file trained and filled by faiss on a GPU and on the CPU",
            "machine": f"{platform.machine()}, {processor()}, {faiss.omp_get_max_threads()} "
            "threads",
            "device": torch.cuda.get_device_name() if gpu else "the same CPU (a rehearsal)",
            "faiss": f"{faiss.__version__} ({faiss.get_compile_options().strip()})",
            "torch": torch.__version__,
            "numpy": np.__version__,
            "left_out": [],
        }

    def add(self, **figures: Any) -> None:
        for name, value in figures.items():
            self.figures[name] = value
            at = time.perf_counter() - self.began
            print(f"{at:6.1f} s  {name}: {_rounded(value)}", flush=True)
        self.figures["elapsed_s"] = time.perf_counter() - self.began
        self.write()

    def has_time(self, what: str, least: float) -> bool:
        """Whether a measurement that takes at least so many seconds may begin."""
        if time.perf_counter() - self.began + least <= self.budget:
            return True
        self.add(left_out=[*self.figures["left_out"], what])
        return False

    def write(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_rounded(self.figures), indent=1) + "\n"
        (self.output / f"{self.name}.json").write_text(text)
        (self.output / f"{self.name}.md").write_text(self.table())

    def table(self) -> str:
        return table(self.figures)


def measure(report: Report, arguments: argparse.Namespace, device: torch.device) -> None:
    gpu = device.type == "cuda"
    n, width = arguments.rows, arguments.width
    factory = arguments.factory or choose_index(n, width)
    if not factory.startswith("IVF"):
        raise SystemExit(f"an index of {n} rows has no lists: take at least 20000")
    count, among = training_rows(n, factory)
    lists = int(factory.removeprefix("IVF").partition(",")[0])
    report.add(
        rows=n, queries=arguments.queries, width=width, factory=factory, train_rows=count,
        steps=STEPS, nprobe=arguments.nprobe,
    )  # fmt: skip
    spent, (vectors, on_device, queries) = timed(
        lambda: make(n, arguments.queries, width, device), gpu
    )
    asked = queries.cpu().numpy()
    report.add(make_s=spent)

    def recalls(index: Any, rows: torch.Tensor, lowest: torch.Tensor) -> list[float]:
        found = [look(index, asked, nprobe) for nprobe in arguments.nprobe]
        return [recall(rows, queries, ids, lowest) for ids in found]

    lowest = exact(on_device, queries)
    train_on = sample(vectors, count, SEED, of=among)

    # The device.
    resources = faiss.StandardGpuResources() if gpu else None
    spent, _ = timed(lambda: warm_up(resources, width), gpu)
    report.add(device_start_s=spent)
    trains, adds = [], []
    for _ in range(arguments.repeats):
        spent, centroids = timed(
            lambda: ivf.train(train_on, lists, seed=SEED) if gpu else plain(train_on, lists), gpu
        )
        trains.append(spent)
    product = 2 * count * lists * width * STEPS
    report.add(device_train_s=trains, device_train_tflop_s=product / np.median(trains) / 1e12)
    for _ in range(arguments.repeats):
        index = None  # so that the GPU's memory is free
        index = on(resources, ivf.empty_index(factory, centroids), n)
        spent, _ = timed(partial(fill, index, vectors), gpu)
        adds.append(spent)
    report.add(device_add_s=adds, device_add_rows_s=n / np.median(adds))
    spent, _ = timed(lambda: look(index, asked, arguments.nprobe[-1]), gpu)
    report.add(device_search_s=spent, device_recall_at_10=recalls(index, on_device, lowest))
    if gpu:
        spent, index = timed(partial(faiss.index_gpu_to_cpu, index), gpu)
        report.add(
            device_to_host_s=spent, device_to_host_recall_at_10=recalls(index, on_device, lowest)
        )
    index = None
    if arguments.skip_cpu:
        return

    # The CPU, what is likely to take least first.
    gpus, ivf.gpus = ivf.gpus, lambda: 0
    try:
        if report.has_time("two-level training", 3):
            spent, cells = timed(lambda: ivf.train(train_on, lists, seed=SEED), gpu)
            report.add(cpu_two_level_train_s=spent)
            ratio(report, "two_level_train_ratio", spent, trains)
            index = on(resources, ivf.empty_index(factory, cells), n)
            fill(index, vectors)
            report.add(two_level_recall_at_10=recalls(index, on_device, lowest))
            index = None
    finally:
        ivf.gpus = gpus
    if report.has_time("ovref's assignment", 3):
        rows = min(n, 8 * ivf.BLOCK)
        spent, _ = timed(lambda: assign(vectors[:rows], centroids), gpu)
        report.add(cpu_assign_rows=rows, cpu_assign_s=spent, cpu_assign_rows_s=rows / spent)
        ratio(report, "assign_ratio", spent / rows * n, adds)
    if report.has_time("adding by faiss on the CPU", 5):
        rows = min(n, arguments.cpu_rows)
        index = ivf.empty_index(factory, centroids)
        spent, _ = timed(lambda: fill(index, vectors[:rows]), gpu)
        report.add(cpu_rows=rows, cpu_add_s=spent, cpu_add_rows_s=rows / spent)
        ratio(report, "add_ratio", spent / rows * n, adds)
        part = on_device[:rows]
        report.add(cpu_recall_at_10=recalls(index, part, exact(part, queries)))
        index = None
    if report.has_time("plain training by faiss on the CPU", 10):
        steps = arguments.cpu_steps
        spent, _ = timed(lambda: plain(train_on, lists, steps), gpu)
        tflop_s = product / spent / 1e12 * steps / STEPS
        report.add(cpu_steps=steps, cpu_train_s=spent, cpu_train_tflop_s=tflop_s)
        ratio(report, "train_ratio", spent / steps * STEPS, trains)
    if "cpu_train_s" in report.figures and "cpu_add_s" in report.figures:
        both = report.figures["cpu_train_s"] / steps * STEPS
        both += report.figures["cpu_add_s"] / rows * n
        ratio(report, "train_and_add_ratio", both, [np.median(trains) + np.median(adds)])


def make(
    n: int, queries: int, width: int, device: torch.device
) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Rows on the host and on the device, and queries on the device."""
    random = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device)

    nouns = max(100, n // 200)
    topics, modes = normal(max(1, nouns // 50), width), normal(4096, width)
    topic = torch.randint(len(topics), (nouns,), generator=random, device=device)
    looks = topics[topic] + 0.8 * normal(nouns, width)
    weights = 1 / (torch.arange(nouns, device=device) + 30.0)  # a long tail
    rows = torch.empty((n + queries, width), device=device)
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        noun = torch.multinomial(weights, len(part), replacement=True, generator=random)
        way = torch.randint(8, (len(part),), generator=random, device=device)
        mode = (noun * 8 + way) * 2654435761 % len(modes)
        x = looks[noun] + 0.7 * modes[mode] + 0.9 * normal(len(part), width)
        part.copy_(torch.nn.functional.normalize(x).half())
    host = np.empty((n, width), dtype=np.float32)
    torch.from_numpy(host).copy_(rows[:n])
    return host, rows[:n], rows[n:]


def exact(rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """(queries,) the score of each query's tenth neighbour."""
    best = torch.full((len(queries), K), -torch.inf, device=rows.device)
    for start in range(0, len(rows), BLOCK):
        scores = queries @ rows[start : start + BLOCK].T
        best = torch.cat([best, scores.topk(K).values], dim=1).topk(K).values
    return best[:, -1]


def recall(
    rows: torch.Tensor, queries: torch.Tensor, found: np.ndarray, lowest: torch.Tensor
) -> float:
    ids = torch.from_numpy(found).to(rows.device)
    scores = torch.einsum("qd,qkd->qk", queries, rows[ids.clamp(min=0)])
    return ((ids >= 0) & (scores >= lowest[:, None] - TIE)).float().mean().item()


def on(resources: Any, index: Any, n: int) -> Any:
    """The index on the GPU, with room for n rows; where there is no GPU, as it is."""
    if resources is None:
        return index
    options = faiss.GpuClonerOptions()
    options.reserveVecs = n
    return faiss.index_cpu_to_gpu(resources, 0, index, options)


def fill(index: Any, vectors: np.ndarray) -> None:
    for start in range(0, len(vectors), BLOCK):
        index.add(vectors[start : start + BLOCK])


def look(index: Any, queries: np.ndarray, nprobe: int) -> np.ndarray:
    """(queries, 10) ids."""
    index.nprobe = min(nprobe, index.nlist)
    return index.search(queries, K)[1]


def plain(train_on: np.ndarray, lists: int, steps: int = STEPS) -> np.ndarray:
    """What `ivf.train` does on GPUs, with the flat index on the CPU."""
    clustering = faiss.Clustering(train_on.shape[1], lists)
    clustering.spherical, clustering.seed, clustering.niter = True, SEED, steps
    clustering.max_points_per_centroid = len(train_on)
    clustering.train(train_on, faiss.IndexFlatIP(train_on.shape[1]))
    return faiss.vector_to_array(clustering.centroids).reshape(lists, -1)


def assign(vectors: np.ndarray, centroids: np.ndarray) -> None:
    cells = ivf.cells_of(centroids)
    for start in range(0, len(vectors), ivf.BLOCK):
        ivf.assign(vectors[start : start + ivf.BLOCK], cells)


def warm_up(resources: Any, width: int) -> None:
    """Loads the kernels, with a small index."""
    rows = np.random.default_rng(1).standard_normal((4096, width), dtype=np.float32)
    centroids = ivf.train(rows, 64, seed=SEED)
    index = on(resources, ivf.empty_index("IVF64,SQfp16", centroids), len(rows))
    index.add(rows)
    index.search(rows[:1000], K)


def timed(work: Callable[[], Any], gpu: bool) -> tuple[float, Any]:
    """Seconds, and what `work` returns."""
    if gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = work()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def ratio(report: Report, name: str, cpu: float, device: list[float]) -> None:
    report.add(**{name: cpu / float(np.median(device))})


def table(figures: dict[str, Any]) -> str:
    def show(name: str, form: str = ".2f") -> str:
        value = figures.get(name)
        if value is None:
            return "-"
        return format(float(np.median(value)), form)

    def times(name: str) -> str:
        return f"{figures[name]:.1f}x" if name in figures else "-"

    def scaled(name: str, of: str, whole: int) -> str:
        return f"{figures[name] / figures[of] * whole:.2f}" if name in figures else "-"

    n, nprobes = figures.get("rows", 0), figures.get("nprobe", [])
    lines = [
        "# faiss on a GPU",
        "",
        f"{figures['what']}: {n:,} rows x {figures.get('width', 0)}, "
        f"`{figures.get('factory', '')}`, trained on {figures.get('train_rows', 0):,} rows in "
        f"{STEPS} steps. {figures['machine']}; {figures['device']}; faiss {figures['faiss']}, "
        f"torch {figures['torch']}, NumPy {figures['numpy']}. Made by "
        "`tests/benchmarks/faiss_gpu.py`, whose first lines say how.",
        "",
        "| | device, s | CPU, s | faster |",
        "|---|---:|---:|---:|",
        f"| train: plain k-means, the CPU's by faiss | {show('device_train_s')} | "
        f"{scaled('cpu_train_s', 'cpu_steps', STEPS)} | {times('train_ratio')} |",
        f"| train: the CPU's in two levels, as ovref does | {show('device_train_s')} | "
        f"{show('cpu_two_level_train_s')} | {times('two_level_train_ratio')} |",
        f"| add: the CPU's by faiss | {show('device_add_s')} | "
        f"{scaled('cpu_add_s', 'cpu_rows', n)} | {times('add_ratio')} |",
        f"| add: the CPU finds lists only, as ovref does | {show('device_add_s')} | "
        f"{scaled('cpu_assign_s', 'cpu_assign_rows', n)} | {times('assign_ratio')} |",
        f"| train and add by faiss | | | {times('train_and_add_ratio')} |",
        "",
        f"The CPU's seconds are scaled: of adding from {figures.get('cpu_rows', 0):,} rows (faiss) "
        f"and {figures.get('cpu_assign_rows', 0):,} rows (ovref), of plain k-means from "
        f"{figures.get('cpu_steps', 0)} steps. The first use of the device took "
        f"{show('device_start_s')} s, taking the index back to the host "
        f"{show('device_to_host_s')} s, searching {figures.get('queries', 0):,} queries at the "
        f"highest nprobe {show('device_search_s', '.3f')} s. Products of training: "
        f"{show('device_train_tflop_s')} TFLOP/s on the device, {show('cpu_train_tflop_s')} on "
        "the CPU.",
        "",
        "| recall@10 | " + " | ".join(f"nprobe {nprobe}" for nprobe in nprobes) + " |",
        "|---|" + "---:|" * len(nprobes),
    ]
    sides = {
        "trained, filled and searched on the device": "device_recall_at_10",
        "the same, taken to the host and searched there": "device_to_host_recall_at_10",
        "trained in two levels on the CPU": "two_level_recall_at_10",
        f"filled by faiss on the CPU, {figures.get('cpu_rows', 0):,} rows": "cpu_recall_at_10",
    }
    for side, name in sides.items():
        if name in figures:
            lines.append(f"| {side} | " + " | ".join(f"{x:.3f}" for x in figures[name]) + " |")
    if figures["left_out"]:
        lines += ["", f"Left out for want of time: {', '.join(figures['left_out'])}."]
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--nprobe", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--factory", help="another index than the one that ovref chooses")
    parser.add_argument("--repeats", type=int, default=3, help="of the device's part")
    parser.add_argument("--cpu-rows", type=int, default=1_000_000, help="added on the CPU")
    parser.add_argument("--cpu-steps", type=int, default=STEPS, help="of k-means on the CPU")
    parser.add_argument("--skip-cpu", action="store_true")
    parser.add_argument("--budget", type=float, default=70, help="seconds")
    return parser.parse_args()




def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(float(value), 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
