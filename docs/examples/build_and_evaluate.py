"""Builds a collection and measures it, from Python: python build_and_evaluate.py OUTPUT [CAPTIONS]

The settings are those of the YAML files and of the shell; `own_captions` and a file of captions of
your own build one with the real models.
"""

import sys

import ovref


def main(output: str, limit: int = 400, scenes: int = 50) -> dict:
    """Builds with the miniature's models; returns what was measured."""
    summary = ovref.build(
        "miniature",
        {"output": output, "corpus.limit": limit, "engine": {"engine": "local", "workers": 1}},
    )
    return ovref.evaluate(
        {"collection": summary.collection_url, "output": f"{output}/evaluation", "scenes": scenes,
         "ablate_n": [], "ablate_k": [], "ablate_gamma": []}
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:2])
