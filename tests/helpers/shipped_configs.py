"""The configurations that ovref ships, by what they are for."""

from pathlib import Path

import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
BUILDS = [
    path
    for path in sorted(CONFIGS.glob("*.yaml"))
    if not path.stem.endswith(("_evaluate", "_tables"))
    and "training" not in yaml.safe_load(path.read_text(encoding="utf-8"))
]
"""Those of `ovref build`."""
