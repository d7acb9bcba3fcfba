"""OpenCut's eigenvectors for a batch of graphs, against the way of MaskCut.

MaskCut (CutLER, `maskcut.py`) solves (D - W) x = lambda D x densely with SciPy, one image at a
time, as `scipy.linalg.eigh(D - A, D, subset_by_index=[1, 2])` in float64.
`ovref_inference.proposers.opencut.second_eigenvectors` iterates on all graphs together. Both are
given the same graphs, made of features of discs on two backgrounds with noise, at the grid of the
paper (60 x 60 patches, DINO ViT-B/8 on 480 pixels) and smaller ones. Compared are seconds a graph
and the masks.

    python tests/benchmarks/opencut.py [--grids 28 60] [--graphs 4] [--threads 1] [--device cpu]

The limits: the dense way reduces a matrix of n nodes to tridiagonal form, 4/3 n^3 operations, after
two triangular solves of n^3 each; a product of the matrix and a vector is 2 n^2.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import scipy
import torch

from ovref_inference.proposers.opencut import WEAK_LINK, foreground_of, second_eigenvectors

TAU = 0.15


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--grids", type=int, nargs="+", default=[28, 60])
    parser.add_argument("--graphs", type=int, default=4)
    parser.add_argument("--dense", type=int, default=1, help="graphs solved the way of MaskCut")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    results = {
        "what": "second eigenvectors of normalised cuts, batched and iterative, against dense ones",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores shared with other work; ours on "
        + (torch.cuda.get_device_name() if device.type == "cuda" else "the same CPU"),
        "clock": "CPU time of the process; wall time for ours on a GPU",
        "threads": arguments.threads,
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "rows": [row(grid, arguments, device) for grid in arguments.grids],
    }
    name = "opencut" if device.type == "cpu" else f"opencut_{device.type}"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / f"{name}.md").write_text(report(results))
    print(report(results))


def row(grid, arguments, device):
    affinity_bnn = torch.stack([graph(grid, seed) for seed in range(arguments.graphs)])
    on_device = affinity_bnn.to(device)
    second_eigenvectors(on_device[:1, :200, :200])  # warm
    started = clock(device)
    found_bn, values_b = second_eigenvectors(on_device)
    ours = (clock(device) - started) / arguments.graphs
    masks_bn = foreground_of(found_bn).cpu().numpy()

    dense, agree, gaps = [], [], []
    for affinity_nn, mask_n, value in zip(
        affinity_bnn.numpy()[: arguments.dense], masks_bn, values_b.tolist(), strict=False
    ):
        started = time.process_time()
        vector_n, exact = maskcut_eigenvector(affinity_nn)
        dense.append(time.process_time() - started)
        expected_n = foreground_of(torch.from_numpy(vector_n)[None])[0].numpy()
        agree.append(float((expected_n == mask_n).mean()))
        gaps.append(abs(exact - value))
        print(f"{grid} x {grid}: dense {dense[-1]:.2f} s, ours {ours:.3f} s", flush=True)
    return {
        "grid": grid,
        "graphs": arguments.graphs,
        "dense_seconds_a_graph": float(np.mean(dense)),
        "ours_seconds_a_graph": ours,
        "times_faster": float(np.mean(dense)) / ours,
        "dense_graphs": len(dense),
        "equal_patches": float(np.mean(agree)),
        "largest_difference_of_eigenvalues": max(gaps),
    }


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def graph(grid, seed):
    """Thresholded similarities of features: three discs on two backgrounds, with noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:grid, 0:grid] / grid
    label_hw = (rows > rng.uniform(0.4, 0.6)).astype(int)
    for thing in range(2, 5):
        y, x, radius = rng.uniform((0.2, 0.2, 0.08), (0.8, 0.8, 0.2))
        label_hw[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = thing
    means = rng.normal(size=(5, 64)) + 0.4 * rng.normal(size=64)
    features = means[label_hw.ravel()] + 0.9 * rng.normal(size=(grid * grid, 64))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    linked = features @ features.T >= TAU
    return torch.from_numpy(np.where(linked, 1.0, WEAK_LINK))


def maskcut_eigenvector(affinity_nn):
    """The second smallest solution as MaskCut asks SciPy for it."""
    degrees = np.diag(affinity_nn.sum(1))
    values, vectors = scipy.linalg.eigh(degrees - affinity_nn, degrees, subset_by_index=[1, 2])
    return vectors[:, 0], values[0]


def report(results):
    lines = [
        "# OpenCut",
        "",
        f"{results['what'].capitalize()}. {results['machine']}; {results['threads']} threads; "
        f"torch {results['torch']}, SciPy {results['scipy']}; {results['clock']}. Made by "
        "`tests/benchmarks/opencut.py`, whose first lines say how.",
        "",
        "| patches | dense, s each | ours, s each | faster | equal patches | eigenvalues within |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['grid']} x {r['grid']} | {r['dense_seconds_a_graph']:.2f} | "
        f"{r['ours_seconds_a_graph']:.3f} | {r['times_faster']:.1f}x | {r['equal_patches']:.2%} | "
        f"{r['largest_difference_of_eigenvalues']:.1e} |"
        for r in results["rows"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
