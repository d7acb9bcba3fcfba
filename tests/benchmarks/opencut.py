"""OpenCut's eigenvectors for a batch of graphs, against other solvers on the same graphs.

MaskCut (CutLER, `maskcut.py`) solves (D - W) x = lambda D x densely with SciPy, one image at a
time. `ovref_inference.proposers.opencut.second_eigenvectors` iterates on all graphs together. Both,
and SciPy's other solvers, are given the same graphs, and their masks are compared.

    python tests/benchmarks/opencut.py [--grids 24 60] [--graphs 4] [--device cpu]
        [--solvers ours dense ...] [--photographs FOLDER]

Graphs are of features of discs on two backgrounds with noise, thresholded at tau = 0.15; or with
`--photographs` of keys of the first photographs of a folder, the most alike 30% of pairs linked,
through a full-size DINO ViT-B/8 with random weights and through the miniature's DINO.

- ours: all graphs as one batch; after one run that does not count, the median of `--repeats`;
- dense: `scipy.linalg.eigh(D - W, D, subset_by_index=[1, 2])`, the way of MaskCut;
- dense_normalised: the two last eigenvectors of D^-1/2 W D^-1/2 by `scipy.linalg.eigh`;
- arpack: `scipy.sparse.linalg.eigsh` of that matrix;
- lobpcg: `scipy.sparse.linalg.lobpcg` of it, the known first eigenvector as a constraint;
- dense_gpu: `torch.linalg.eigh` in float64 on the device of ours.

Times are CPU time of the process, on a GPU wall time; of dense solvers for the first graph alone.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy
import scipy.linalg
import scipy.sparse.linalg
import torch
from PIL import Image

from ovref_inference.encoders.config import VisualEncoderConfig
from ovref_inference.proposers.opencut import WEAK_LINK, foreground_of, second_eigenvectors

SOLVERS = {
    "cpu": ["ours", "dense", "dense_normalised", "arpack", "lobpcg"],
    "cuda": ["ours", "dense_gpu", "dense"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--grids", type=int, nargs="+", default=[24, 60])
    parser.add_argument("--graphs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--solvers", nargs="+", help="default: those of the device")
    parser.add_argument("--photographs", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    name = "opencut" if device.type == "cpu" else f"opencut_{device.type}"
    results = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores shared with other work"
        + (f", {torch.cuda.get_device_name()}" if device.type == "cuda" else ""),
        "clock": "wall time" if device.type == "cuda" else "CPU time of the process",
        "threads": arguments.threads,
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "rows": [],
    }
    for grid in arguments.grids:
        for features, links_gnn in graphs(grid, arguments):
            row = {"grid": grid, "features": features, "graphs": len(links_gnn)}
            results["rows"].append(row | measured(links_gnn, arguments, device))
            arguments.output.mkdir(parents=True, exist_ok=True)
            (arguments.output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
            (arguments.output / f"{name}.md").write_text(report(results))
    print(report(results))


def graphs(grid, arguments):
    """Names of features, and (graphs, n, n) bool links made of them on the CPU."""
    if arguments.photographs is None:
        yield "discs", torch.stack([disc_links(grid, seed) for seed in range(arguments.graphs)])
        return
    from transformers import ViTConfig, ViTModel

    from ovref_inference.encoders import load_visual_encoder

    paths = sorted(arguments.photographs.glob("*.jpg"))[: arguments.graphs]
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        ViTModel(ViTConfig(patch_size=8), add_pooling_layer=False).save_pretrained(folder)
        settings = {"image_processor_type": "ViTImageProcessor"}
        Path(folder, "preprocessor_config.json").write_text(json.dumps(settings))
        for model, patch in ((folder, 8), ("miniature:dino", 4)):
            size_hw = (grid * patch, grid * patch)
            config = VisualEncoderConfig(model=model, size_hw=size_hw, features="keys")
            keys = torch.from_numpy(load_visual_encoder(config, batch_size=1).encode(images))
            keys = torch.nn.functional.normalize(keys.flatten(1, 2), dim=-1).cpu()
            similar = keys @ keys.mT
            some = similar.flatten(1)[:, ::97].quantile(0.7, dim=1)
            yield ("ViT-B/8, random" if patch == 8 else "miniature"), similar >= some[:, None, None]


def disc_links(grid, seed):
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
    return torch.from_numpy(features @ features.T >= 0.15)


def measured(links_gnn, arguments, device):
    """Seconds a graph of every solver, and the share of patches on which its masks equal ours."""
    links = links_gnn.to(device, torch.float64)
    second_eigenvectors(links)
    seconds = []
    for _ in range(arguments.repeats):
        started = clock(device)
        found_gn, _ = second_eigenvectors(links)
        seconds.append((clock(device) - started) / len(links))
    masks_gn = foreground_of(found_gn).cpu()
    row = {"seconds": {"ours": statistics.median(seconds)}, "equal": {"ours": 1.0}}
    weights = links[0] + WEAK_LINK * (1 - links[0])
    for name in arguments.solvers or SOLVERS[device.type]:
        if name == "ours":
            continue
        on = device if name == "dense_gpu" else torch.device("cpu")
        started = clock(on)
        vector_n = SOLVE[name](weights if name == "dense_gpu" else weights.cpu().numpy())
        row["seconds"][name] = clock(on) - started
        mask_n = foreground_of(torch.as_tensor(np.array(vector_n))[None])[0]
        row["equal"][name] = (mask_n == masks_gn[0]).double().mean().item()
        print(name, row["seconds"][name], row["equal"][name], flush=True)
    return row


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def dense(w_nn):
    degrees = np.diag(w_nn.sum(1))
    return scipy.linalg.eigh(degrees - w_nn, degrees, subset_by_index=[1, 2])[1][:, 0]


def dense_normalised(w_nn):
    a_nn, root_n = normalised(w_nn)
    last = [len(a_nn) - 2, len(a_nn) - 1]
    return scipy.linalg.eigh(a_nn, subset_by_index=last)[1][:, 0] / root_n


def arpack(w_nn):
    a_nn, root_n = normalised(w_nn)
    start_n = np.random.default_rng(0).normal(size=len(a_nn))
    values, vectors = scipy.sparse.linalg.eigsh(a_nn, k=2, which="LA", tol=1e-9, v0=start_n)
    return vectors[:, values.argmin()] / root_n


def lobpcg(w_nn):
    a_nn, root_n = normalised(w_nn)
    start = np.random.default_rng(0).normal(size=(len(a_nn), 2))
    _, vectors = scipy.sparse.linalg.lobpcg(
        a_nn, start, Y=root_n[:, None], tol=1e-9, maxiter=500, largest=True
    )
    return vectors[:, 0] / root_n


def dense_gpu(w_nn):
    root_n = w_nn.sum(1).sqrt()
    vectors = torch.linalg.eigh(w_nn / root_n[:, None] / root_n)[1]
    return (vectors[:, -2] / root_n).cpu().numpy()


def normalised(w_nn):
    root_n = np.sqrt(w_nn.sum(1))
    return w_nn / root_n[:, None] / root_n, root_n


SOLVE = {solve.__name__: solve for solve in (dense, dense_normalised, arpack, lobpcg, dense_gpu)}


def report(results):
    lines = [
        "# OpenCut",
        "",
        "Second eigenvectors of normalised cuts by several solvers: seconds a graph, and in "
        f"brackets the share of patches on which the mask equals ours. {results['machine']}; "
        f"{results['threads']} threads; torch {results['torch']}, SciPy {results['scipy']}; "
        f"{results['clock']}. Made by `tests/benchmarks/opencut.py`, whose first lines say how.",
        "",
    ]
    names = list(dict.fromkeys(name for row in results["rows"] for name in row["seconds"]))
    lines += [
        f"| patches | features | {' | '.join(names)} |",
        f"|---:|---|{'---:|' * len(names)}",
    ]
    for row in results["rows"]:
        cells = [
            f"{row['seconds'][name]:.4f} ({row['equal'][name]:.2%})" if name in row["seconds"]
            else "-"
            for name in names
        ]  # fmt: skip
        lines.append(f"| {row['grid']} x {row['grid']} | {row['features']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
