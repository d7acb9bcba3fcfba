"""OpenCut's eigenvectors for a batch of graphs, against the way of MaskCut.

MaskCut (CutLER, `maskcut.py`) solves (D - W) x = lambda D x densely with SciPy, one image at a
time, as `scipy.linalg.eigh(D - A, D, subset_by_index=[1, 2])` in float64.
`ovref_inference.proposers.opencut.second_eigenvectors` iterates on all graphs together. Both are
given the same graphs, made of features of discs on two backgrounds with noise, at the grid of the
paper (60 x 60 patches, DINO ViT-B/8 on 480 pixels) and smaller ones. Compared are seconds a graph
and the masks.

    python tests/benchmarks/opencut.py [--grids 28 60] [--graphs 4] [--threads 1] [--device cpu]
        [--parts ours dense ...] [--add]

The parts, in the order they are given:

- ours: all graphs as one batch; after one run that does not count, the median of `--repeats`;
- variants: cheaper ways to do the same, which the product does not have yet (see `solve`);
- profile: one more run of ours, each operator waited for, seconds by kind of operator; and one
  product with the matrices, its bytes beside the memory's measured speed;
- dense_gpu: `torch.linalg.eigh` in float64 of one normalised graph, on the device of ours;
- dense: the way of MaskCut on the CPU, with as many threads as SciPy's BLAS takes; nothing of ours
  runs beside it.

With `--add` what an earlier run left in the folder is kept, so that parts can be run alone, each in
a process of its own (the graphs are the same). Files are written after every figure.

The limits: the dense way reduces a matrix of n nodes to tridiagonal form, 4/3 n^3 operations, after
two triangular solves of n^3 each; a product of the matrix and a vector is 2 n^2, and reads the
matrix, 8 n^2 bytes.
"""

import argparse
import collections
import ctypes
import json
import os
import platform
import re
import statistics
import time
import traceback
from pathlib import Path

import numpy as np
import scipy
import scipy.linalg
import torch
from torch.overrides import TorchFunctionMode

from ovref_inference.proposers.opencut import (
    BLOCK,
    DEPTH,
    WEAK_LINK,
    foreground_of,
    second_eigenvectors,
)

TAU = 0.15
PARTS = {"cpu": ["ours", "dense"], "cuda": ["ours", "variants", "profile", "dense_gpu", "dense"]}
"""What is measured by default."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--grids", type=int, nargs="+", default=[28, 60])
    parser.add_argument("--graphs", type=int, default=4)
    parser.add_argument("--dense", type=int, default=1, help="graphs solved the way of MaskCut")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--noise", type=float, default=0.9, help="more of it: more cycles of ours")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS["cuda"], help="default: see the code")
    parser.add_argument("--add", action="store_true", help="to what the folder has")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    name = "opencut" if device.type == "cpu" else f"opencut_{device.type}"
    results = {
        "what": "second eigenvectors of normalised cuts, batched and iterative, against dense ones",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores shared with other work; ours on "
        + (torch.cuda.get_device_name() if device.type == "cuda" else "the same CPU"),
        "clock": "wall time" if device.type == "cuda" else "CPU time of the process",
        "threads": arguments.threads,
        "noise": arguments.noise,
        "threads_of_dense": blas_threads(),
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "rows": [],
    }
    earlier = arguments.output / f"{name}.json"
    if arguments.add and earlier.exists():
        results["rows"] = json.loads(earlier.read_text())["rows"]

    def save(row):
        results["rows"] = [r for r in results["rows"] if r["grid"] != row["grid"]] + [row]
        arguments.output.mkdir(parents=True, exist_ok=True)
        earlier.write_text(json.dumps(results, indent=1) + "\n")
        (arguments.output / f"{name}.md").write_text(report(results))

    parts = arguments.parts or PARTS[device.type]
    for grid in arguments.grids:
        row = next((r for r in results["rows"] if r["grid"] == grid), None)
        if row is None or row["graphs"] != arguments.graphs:
            row = {"grid": grid, "graphs": arguments.graphs, "masks": {}}
        measure(row, parts, arguments, device, lambda row=row: save(row))
    print(report(results))
    if any("errors" in row for row in results["rows"]):
        raise SystemExit(1)


def measure(row, parts, arguments, device, save):
    grid = row["grid"]
    # Edges are compared on the CPU, so that every device and every process has the same.
    linked_bnn = torch.stack(
        [links(grid, seed, arguments.noise) for seed in range(arguments.graphs)]
    )
    on_device = linked_bnn.to(device)
    for part in parts:
        try:
            PART[part](row, on_device, arguments, device, save)
        except Exception as error:  # the other parts are worth having
            traceback.print_exc()
            row.setdefault("errors", {})[part] = repr(error)
            save()


def ours(row, linked_bnn, arguments, device, save):
    affinity_bnn = affinity(linked_bnn)
    seconds, (found_bn, values_b), peak = timed(
        lambda: second_eigenvectors(affinity_bnn), arguments.repeats, device
    )
    row["ours_seconds_a_graph"] = statistics.median(seconds) / arguments.graphs
    row["ours_seconds"], row["ours_peak_bytes"] = seconds, peak
    row["ours_eigenvalues"] = values_b.tolist()
    row["masks"]["ours"] = packed(found_bn)
    done(row, "ours", row["ours_seconds_a_graph"], save)


def variants(row, linked_bnn, arguments, device, save):
    row["variants"] = {}
    for name, settings in VARIANTS.items():
        seconds, (found_bn, values_b, cycles), peak = timed(
            lambda settings=settings: solve(linked_bnn, **settings), arguments.repeats, device
        )
        row["variants"][name] = {
            "seconds_a_graph": statistics.median(seconds) / arguments.graphs,
            "seconds": seconds,
            "peak_bytes": peak,
            "cycles": cycles,
            "eigenvalues": values_b.tolist(),
        }
        row["masks"][name] = packed(found_bn)
        done(row, f"variant {name}", row["variants"][name]["seconds_a_graph"], save)


def profiled(row, linked_bnn, arguments, device, save):
    affinity_bnn = affinity(linked_bnn)
    row["profile"] = profile(affinity_bnn, device)
    for kind, (seconds, calls) in row["profile"].items():
        print(f"    {kind}: {seconds:.4f} s, {calls} calls", flush=True)
    save()
    row["product"] = product_speed(affinity_bnn, arguments.repeats, device)
    print(f"    {sentence_on_products(row['product'])}", flush=True)
    save()


def dense_gpu(row, linked_bnn, arguments, device, save):
    seconds, (vector_n, value), _ = timed(lambda: dense_here(linked_bnn[0]), 1, device)
    row["dense_gpu_seconds_a_graph"] = seconds[0]
    row["masks"]["dense_gpu"] = packed(vector_n[None])
    row["dense_gpu_eigenvalue"] = value
    done(row, "dense_gpu", seconds[0], save)


def dense(row, linked_bnn, arguments, device, save):
    row["dense_wall"], row["dense_cpu"] = [], []
    row["dense_eigenvalues"], row["masks"]["dense"] = [], []
    for linked_nn in linked_bnn[: arguments.dense].cpu():
        affinity_nn = affinity(linked_nn[None])[0].numpy()
        wall, cpu = time.perf_counter(), time.process_time()
        vector_n, value = maskcut_eigenvector(affinity_nn)
        row["dense_wall"].append(time.perf_counter() - wall)
        row["dense_cpu"].append(time.process_time() - cpu)
        row["dense_eigenvalues"].append(float(value))
        row["masks"]["dense"] += packed(torch.from_numpy(vector_n)[None])
        kind = "dense_wall" if device.type == "cuda" else "dense_cpu"
        row["dense_seconds_a_graph"] = float(np.mean(row[kind]))
        row["dense_graphs"] = len(row["dense_wall"])
        done(row, "dense", row["dense_seconds_a_graph"], save)


def done(row, part, seconds, save):
    """What follows from two parts together; then everything is written."""
    if "ours_seconds_a_graph" in row and "dense_seconds_a_graph" in row:
        row["times_faster"] = row["dense_seconds_a_graph"] / row["ours_seconds_a_graph"]
        pairs = zip(row["ours_eigenvalues"], row["dense_eigenvalues"], strict=False)
        row["largest_difference_of_eigenvalues"] = max(abs(a - b) for a, b in pairs)
    judge = "dense" if "dense" in row["masks"] else "ours"
    row["equal_patches_with"] = judge
    row["equal_patches"] = {
        name: equal(masks, row["masks"][judge], row["grid"] ** 2)
        for name, masks in row["masks"].items()
        if judge in row["masks"] and name != judge
    }
    print(
        f"{row['grid']} x {row['grid']}, {part}: {seconds:.4f} s a graph; patches as {judge}: "
        f"{row['equal_patches']}",
        flush=True,
    )
    save()


def timed(run, repeats, device):
    """Seconds of each repeat after one run that does not count, the result, most bytes on a GPU."""
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        found = None
        started = clock(device)
        found = run()
        seconds.append(clock(device) - started)
    return seconds, found, torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def packed(vectors_bn):
    """The masks of eigenvectors, as hexadecimal digits."""
    return [
        np.packbits(mask_n).tobytes().hex() for mask_n in foreground_of(vectors_bn).cpu().numpy()
    ]


def equal(some, others, count):
    """The share of patches on which masks agree, of as many graphs as both have."""
    differing = [(int(a, 16) ^ int(b, 16)).bit_count() for a, b in zip(some, others, strict=False)]
    return 1 - sum(differing) / (count * len(differing))


def links(grid, seed, noise):
    """Thresholded similarities of features: three discs on two backgrounds, with noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:grid, 0:grid] / grid
    label_hw = (rows > rng.uniform(0.4, 0.6)).astype(int)
    for thing in range(2, 5):
        y, x, radius = rng.uniform((0.2, 0.2, 0.08), (0.8, 0.8, 0.2))
        label_hw[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = thing
    means = rng.normal(size=(5, 64)) + 0.4 * rng.normal(size=64)
    features = means[label_hw.ravel()] + noise * rng.normal(size=(grid * grid, 64))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return torch.from_numpy(features @ features.T >= TAU)


def affinity(linked_bnn):
    """As `opencut.maskcut` makes it: 1 where linked, elsewhere the weak link."""
    return linked_bnn.double().clamp_(min=WEAK_LINK)


def maskcut_eigenvector(affinity_nn):
    """The second smallest solution as MaskCut asks SciPy for it."""
    degrees = np.diag(affinity_nn.sum(1))
    values, vectors = scipy.linalg.eigh(degrees - affinity_nn, degrees, subset_by_index=[1, 2])
    return vectors[:, 0], values[0]


def dense_here(linked_nn):
    """The same by PyTorch on the device of the graph: all eigenvectors, as it has no other way."""
    affinity_nn = affinity(linked_nn[None])[0]
    root_n = affinity_nn.sum(1).sqrt()
    affinity_nn /= root_n[:, None]
    affinity_nn /= root_n[None, :]
    values, vectors = torch.linalg.eigh(affinity_nn)
    return vectors[:, -2] / root_n, 1 - values[-2].item()


def solve(linked_bnn, links_only, tolerance=1e-9, max_cycles=50):
    """`second_eigenvectors` without LAPACK's QR, which runs on one graph after the other.

    A new block is made orthonormal by Cholesky factors of its Gram matrix, three times, as in
    shifted CholeskyQR3 (Fukaya and others, SIAM J. Sci. Comput. 2020): small products in one batch.

    Args:
        linked_bnn: (graphs, n, n) bool.
        links_only: no matrix of doubles is kept. W = e + (1 - e) B with B of zeros and ones, which
            is held in half precision; see `LinkProduct`.

    Returns:
        As `second_eigenvectors`, and how many cycles were made.
    """
    graphs, n, _ = linked_bnn.shape
    product = (LinkProduct if links_only else MatrixProduct)(linked_bnn)
    root_bn, device = product.root_bn, linked_bnn.device
    top = torch.nn.functional.normalize(root_bn, dim=1)[:, :, None]
    block = min(BLOCK, n)
    depth = max(1, min(DEPTH, n // block))
    start = torch.randn(n, block, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.linalg.qr(start)[0].to(device).expand(graphs, n, block)
    y_bn = torch.zeros(graphs, n, dtype=torch.float64, device=device)
    mu_b = torch.zeros(graphs, dtype=torch.float64, device=device)
    left = torch.arange(graphs, device=device)

    def apply(vectors):
        return product(vectors) - 2 * top * (top.mT @ vectors)

    for cycle in range(1, max_cycles + 1):
        # Filled in place: joining them anew for each block copies them all.
        basis = x.new_zeros(len(left), n, depth * block)
        image = torch.zeros_like(basis)
        basis[:, :, :block], image[:, :, :block] = x, apply(x)
        for step in range(1, depth):
            now = slice(step * block, (step + 1) * block)
            before = slice((step - 1) * block, step * block)
            fresh = orthonormal(image[:, :, before], basis[:, :, : step * block])
            basis[:, :, now], image[:, :, now] = fresh, apply(fresh)
        small = basis.mT @ image
        values, vectors = torch.linalg.eigh((small + small.mT) / 2)
        x = basis @ vectors[:, :, -block:]
        best, value = x[:, :, -1], values[:, -1]
        residual = ((image @ vectors[:, :, -1:])[:, :, 0] - value[:, None] * best).norm(dim=1)
        finished = residual < tolerance
        y_bn[left[finished]], mu_b[left[finished]] = best[finished], value[finished]
        if finished.all():
            return y_bn / root_bn, 1 - mu_b, cycle
        if finished.any():
            left, x, top = left[~finished], x[~finished], top[~finished]
            product.keep(~finished)
    raise RuntimeError(f"{len(left)} graphs are not finished after {max_cycles} cycles")


def orthonormal(fresh, basis):
    """(graphs, n, few) orthonormal columns that `fresh` adds to the space of `basis`."""
    shift = 1e-14 * torch.eye(fresh.shape[2], dtype=fresh.dtype, device=fresh.device)
    for _ in range(3):
        fresh = fresh - basis @ (basis.mT @ fresh)
        fresh = torch.nn.functional.normalize(fresh, dim=1, eps=1e-300)
        lower = torch.linalg.cholesky_ex(fresh.mT @ fresh + shift)[0]
        inverse = torch.linalg.solve_triangular(lower, shift / 1e-14, upper=False)
        fresh = fresh @ inverse.mT
    return fresh


class MatrixProduct:
    """D^-1/2 W D^-1/2 as a matrix of doubles, as in the product."""

    def __init__(self, linked_bnn):
        self.a_bnn = affinity(linked_bnn)
        self.root_bn = self.a_bnn.sum(2).sqrt()
        self.a_bnn /= self.root_bn[:, :, None]
        self.a_bnn /= self.root_bn[:, None, :]

    def keep(self, chosen):
        self.a_bnn = self.a_bnn[chosen]

    def __call__(self, vectors):
        return self.a_bnn @ vectors


class LinkProduct:
    """The same from zeros and ones of two bytes each (four on a CPU), a quarter of the memory.

    W z = e sum(z) + (1 - e) B z. z is written as DIGITS numbers from -1024 to 1024, each weighing
    2^-11 of the one before. Half precision holds these as they are, and a sum of up to 2^14 of them
    is a whole number below 2^24, which single precision holds as it is: so B z has the rounding of
    z's last digit, 2^-55 of its largest entry, and no other, whatever the order of the sum.
    """

    DIGITS = 5

    def __init__(self, linked_bnn):
        on_gpu = linked_bnn.device.type == "cuda"
        if linked_bnn.shape[1] > 2**14:
            raise ValueError("sums of more than 2^14 digits do not fit in single precision")
        self.b_bnn = linked_bnn.to(torch.float16 if on_gpu else torch.float32)
        self.options = {"out_dtype": torch.float32} if on_gpu else {}
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        count_bn = linked_bnn.sum(2).double()
        self.root_bn = (WEAK_LINK * linked_bnn.shape[1] + (1 - WEAK_LINK) * count_bn).sqrt()
        self.inverse = 1 / self.root_bn[:, :, None]

    def keep(self, chosen):
        self.b_bnn, self.inverse = self.b_bnn[chosen], self.inverse[chosen]

    def __call__(self, vectors):
        z = vectors * self.inverse
        scale = z.abs().amax(1, keepdim=True).clamp_(min=1e-300) / 1024
        rest, digits = z / scale, []
        for _ in range(self.DIGITS):
            digit = rest.round()
            digits.append(digit.to(self.b_bnn.dtype))
            rest = (rest - digit) * 2048
        sums = torch.bmm(self.b_bnn, torch.cat(digits, dim=2), **self.options).double()
        total, width = 0, vectors.shape[2]
        for number in reversed(range(self.DIGITS)):
            total = total / 2048 + sums[:, :, number * width : (number + 1) * width]
        strong = (1 - WEAK_LINK) * scale * total
        return (WEAK_LINK * z.sum(1, keepdim=True) + strong) * self.inverse


PART = {
    "ours": ours,
    "variants": variants,
    "profile": profiled,
    "dense_gpu": dense_gpu,
    "dense": dense,
}

VARIANTS = {
    "without QR": {"links_only": False},
    "without QR, links only": {"links_only": True},
}


class ByOperator(TorchFunctionMode):
    """Seconds and calls of each kind of operator, the device waited for before and after."""

    def __init__(self, n, device):
        super().__init__()
        self.n, self.device = n, device
        self.found = collections.defaultdict(lambda: [0.0, 0])

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "size", "dim"):
            return func(*args, **(kwargs or {}))
        if "matmul" in name:
            tall = all(side == self.n for side in args[0].shape[-2:])
            name = "product with the matrices" if tall else "products with the basis"
        started = clock(self.device)
        result = func(*args, **(kwargs or {}))
        entry = self.found[name]
        entry[0] += clock(self.device) - started
        entry[1] += 1
        return result


def profile(affinity_bnn, device):
    """Kind of operator -> seconds, calls; the largest first, those of less than 1% left out."""
    with ByOperator(affinity_bnn.shape[1], device) as mode:
        started = clock(device)
        second_eigenvectors(affinity_bnn)
        total = clock(device) - started
    found = sorted(mode.found.items(), key=lambda item: -item[1][0])
    kept = {name: entry for name, entry in found if entry[0] >= 0.01 * total}
    rest = total - sum(seconds for seconds, _ in kept.values())
    return {"all": [total, sum(calls for _, calls in mode.found.values())], **kept,
            "others and between operators": [rest, 0]}  # fmt: skip


def product_speed(affinity_bnn, repeats, device):
    """One product of every matrix with a block, and a copy of the matrices, which reads and writes
    all of their bytes."""
    graphs, n, _ = affinity_bnn.shape
    vectors = torch.randn(graphs, n, BLOCK, dtype=torch.float64, device=device)
    target = torch.empty_like(affinity_bnn)
    product, _, _ = timed(lambda: affinity_bnn @ vectors, repeats, device)
    copy, _, _ = timed(lambda: target.copy_(affinity_bnn), repeats, device)
    size = affinity_bnn.numel() * affinity_bnn.element_size()
    halves = LinkProduct(affinity_bnn > 0.5)
    links_seconds, found, _ = timed(lambda: halves(vectors), repeats, device)
    expected = halves.inverse * (affinity_bnn @ (halves.inverse * vectors))
    return {
        "bytes": size,
        "seconds": statistics.median(product),
        "bytes_a_second": size / statistics.median(product),
        "copied_bytes_a_second": 2 * size / statistics.median(copy),
        "links_only_bytes": halves.b_bnn.numel() * halves.b_bnn.element_size(),
        "links_only_seconds": statistics.median(links_seconds),
        "links_only_difference": ((found - expected).abs().max() / expected.abs().max()).item(),
    }


def sentence_on_products(product):
    return (
        f"One product reads {product['bytes'] / 1e9:.3f} GB in {product['seconds'] * 1e3:.2f} ms, "
        f"{product['bytes_a_second'] / 1e12:.3f} TB/s; copying the same runs at "
        f"{product['copied_bytes_a_second'] / 1e12:.3f} TB/s, so that is "
        f"{product['bytes_a_second'] / product['copied_bytes_a_second']:.0%} of what the memory "
        f"gives. With links only: {product['links_only_bytes'] / 1e9:.3f} GB in "
        f"{product['links_only_seconds'] * 1e3:.2f} ms, equal within "
        f"{product['links_only_difference']:.1e} of the largest."
    )


def blas_threads():
    """Threads of SciPy's own OpenBLAS; None where it has another BLAS."""
    scipy.linalg.eigh(np.eye(2))  # loads it
    with open("/proc/self/maps", encoding="utf-8") as file:
        libraries = set(re.findall(r"/\S*scipy\S*openblas\S*\.so\S*", file.read()))
    for path in sorted(libraries, key=lambda path: "numpy" in path):
        for name in ("scipy_openblas_get_num_threads", "scipy_openblas_get_num_threads64_",
                     "openblas_get_num_threads"):  # fmt: skip
            function = getattr(ctypes.CDLL(path), name, None)
            if function is not None:
                return function()
    return None


def report(results):
    lines = [
        "# OpenCut",
        "",
        f"{results['what'].capitalize()}. {results['machine']}; {results['threads']} threads, the "
        f"dense way as many as SciPy's BLAS takes ({results['threads_of_dense'] or 'unknown'}); "
        f"torch {results['torch']}, SciPy {results['scipy']}; {results['clock']}. Made by "
        "`tests/benchmarks/opencut.py`, whose first lines say how.",
        "",
        "| patches | graphs | dense, s each | ours, s each | faster | equal patches "
        "| eigenvalues within |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]

    def cell(row, key, form, unit=""):
        return format(row[key], form) + unit if row.get(key) is not None else "-"

    for r in results["rows"]:
        same = {"equal": r.get("equal_patches", {}).get("ours")}
        lines.append(
            f"| {r['grid']} x {r['grid']} | {r['graphs']} "
            f"| {cell(r, 'dense_seconds_a_graph', '.2f')} "
            f"| {cell(r, 'ours_seconds_a_graph', '.4f')} | {cell(r, 'times_faster', '.1f', 'x')} "
            f"| {cell(same, 'equal', '.2%')} "
            f"| {cell(r, 'largest_difference_of_eigenvalues', '.1e')} |"
        )
    for r in results["rows"]:
        if not {"variants", "profile", "dense_gpu_seconds_a_graph", "errors"} & set(r):
            continue
        judge, same = r.get("equal_patches_with"), r.get("equal_patches", {})
        lines += ["", f"{r['grid']} x {r['grid']}:", ""]
        if "ours_seconds" in r:
            lines.append(
                f"- ours, all {r['graphs']} graphs: "
                f"{', '.join(f'{s:.3f}' for s in r['ours_seconds'])} s{_memory(r, 'ours_')}"
            )
        if "dense_wall" in r:
            lines.append(
                f"- dense on the CPU: wall {', '.join(f'{s:.2f}' for s in r['dense_wall'])} s, "
                f"CPU {', '.join(f'{s:.2f}' for s in r['dense_cpu'])} s"
            )
        if "dense_gpu_seconds_a_graph" in r:
            lines.append(
                f"- dense by `torch.linalg.eigh` on the device of ours: "
                f"{r['dense_gpu_seconds_a_graph']:.3f} s a graph"
                + (f", patches as {judge}: {same['dense_gpu']:.2%}" if "dense_gpu" in same else "")
            )
        for name, found in r.get("variants", {}).items():
            lines.append(
                f"- {name} (not in the product): {found['seconds_a_graph']:.4f} s a graph, "
                f"{found['cycles']} cycles{_memory(found, '')}"
                + (f", patches as {judge}: {same[name]:.2%}" if name in same else "")
            )
        for part, error in r.get("errors", {}).items():
            lines.append(f"- {part} failed: {error}")
        if "profile" in r:
            lines += ["", "| operator, waited for each time | s | calls |", "|---|---:|---:|"]
            lines += [f"| {name} | {s:.4f} | {n} |" for name, (s, n) in r["profile"].items()]
        if "product" in r:
            lines += ["", sentence_on_products(r["product"])]
    return "\n".join(lines) + "\n"


def _memory(found, prefix):
    peak = found.get(f"{prefix}peak_bytes")
    return f", at most {peak / 1e9:.2f} GB on the card" if peak else ""


if __name__ == "__main__":
    main()
