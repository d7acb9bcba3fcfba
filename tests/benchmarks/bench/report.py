"""The results of a benchmark for people and for programs."""

import json
import sys
from pathlib import Path
from typing import Any

from bench.limits import BenchSpec
from bench.measure import bench


def run(spec: BenchSpec) -> None:
    """Runs a benchmark, prints the table and writes JSON if the settings name a file."""
    result = bench(spec, progress=lambda line: print(line, file=sys.stderr, flush=True))
    print(table(result))
    if spec.output is not None:
        write(result, spec.output)


def write(result: dict[str, Any], path: str) -> None:
    """Writes the results as JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """The results as Markdown, with the arithmetic."""
    spec, flops, top = result["spec"], result["flops"], result["ceiling"]
    machine = result["machine"]
    lines = [
        f"# {spec['preset']}, {spec['dtype']}, {spec['steps']} steps, guidance {spec['guidance']}",
        "",
        f"{machine['device']}, torch {machine['torch']}, {machine['threads']} threads; times are "
        f"{result['clock']}.",
        "",
        f"Ceiling: 2 x {top['size']}^3 operations in {2 * top['size'] ** 3 / top['flops']:.3g} s = "
        f"{_tera(top['flops'])} TFLOP/s.",
        f"An image: {flops['unet_rows_per_image']} UNet rows x {_tera(flops['unet_row'])} + "
        f"{flops['texts_per_image']} texts x {_tera(flops['text'])} + decoding "
        f"{_tera(flops['decode'])} = {_tera(flops['image'])} TFLOP.",
        f"Limit: {_tera(top['flops'])} / {_tera(flops['image'])} = "
        f"{top['flops'] / flops['image']:.3g} images/s.",
    ]
    rows = [row for row in result["rows"] if "error" not in row]
    if rows:
        lines += ["", *_rows(rows), "", *_parts(rows)]
        best = max(rows, key=lambda row: row["images_per_second"])
        lines += ["", f"Fastest: {best['scheduler']} in batches of {best['batch_size']}."]
    for row in result["rows"]:
        if "error" in row:
            lines += ["", f"{row['scheduler']}, batch of {row['batch_size']}: {row['error']}."]
    if "backbones" in result:
        lines += [
            "",
            "| forward pass | images/s | TFLOP an image | of ceiling |",
            "|---|---:|---:|---:|",
        ]
        lines += [
            f"| {name} | {found['images_per_second']:.2f} | {_tera(found['flops'])} | "
            f"{found['share_of_ceiling']:.0%} |"
            for name, found in result["backbones"].items()
        ]
    return "\n".join(lines) + "\n"


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    head = (
        "| scheduler | batch | images/s | attribution | UNet's share of the time | of ceiling | "
        "UNet alone, of ceiling | peak GB |"
    )
    return [
        head,
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {row['scheduler']} | {row['batch_size']} | {row['images_per_second']:.3g} | "
            f"{row['attribution_percent_of_generation']:+.1f}% | {row['unet_share_of_time']:.0%} | "
            f"{row['share_of_ceiling']:.0%} | {row['unet_share_of_ceiling']:.0%} | "
            f"{row['peak_memory_gb']:.2f} |"
            for row in rows
        ),
    ]


def _parts(rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0]["seconds_by_part"])
    return [
        "Milliseconds of an image, each part alone:",
        "",
        f"| scheduler | batch | {' | '.join(names)} |",
        f"|---|{'---:|' * (1 + len(names))}",
        *(
            f"| {row['scheduler']} | {row['batch_size']} | "
            + " | ".join(f"{1000 * row['seconds_by_part'][name]:.2f}" for name in names)
            + " |"
            for row in rows
        ),
    ]


def _tera(operations: float) -> str:
    return f"{operations / 1e12:.4g}"
