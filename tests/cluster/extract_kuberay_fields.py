"""Rewrites kuberay_fields.json from KubeRay's published schemas, for the fields cluster/ uses.

    python tests/cluster/extract_kuberay_fields.py CRD_FOLDER COMMIT

CRD_FOLDER is `helm-chart/kuberay-operator/crds` of a checkout of ray-project/kuberay.
"""

import json
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
FILES = {"RayCluster": "raycluster-dev.yaml", "RayJob": "rayjob.yaml"}


def shortened(schema, values):
    """The schema without descriptions; fields that no value uses keep their names only."""
    kept = {
        name: schema[name]
        for name in ("type", "format", "enum", "pattern", "required", "anyOf")
        if name in schema
    }
    if schema.get("x-kubernetes-int-or-string"):
        kept["x-kubernetes-int-or-string"] = True
    if "properties" in schema:
        used = {name for value in values if isinstance(value, dict) for name in value}
        kept["properties"] = {
            name: shortened(field, [v[name] for v in values if name in v]) if name in used else {}
            for name, field in sorted(schema["properties"].items())
        }
    elif isinstance(schema.get("additionalProperties"), dict):
        inner = [v for value in values if isinstance(value, dict) for v in value.values()]
        kept["additionalProperties"] = shortened(schema["additionalProperties"], inner)
    if "items" in schema:
        inner = [v for value in values if isinstance(value, list) for v in value]
        kept["items"] = shortened(schema["items"], inner)
    return kept


def main(folder, commit):
    found = {
        "source": "ray-project/kuberay (Apache-2.0), helm-chart/kuberay-operator/crds/"
        f"ray.io_rayjobs.yaml and ray.io_rayclusters.yaml, version v1, `spec`, at commit {commit} "
        "(after v1.7.0-rc.0). Descriptions are left out; below fields that cluster/ does not use, "
        "only their names are kept."
    }
    for kind, name in FILES.items():
        crd = yaml.safe_load(Path(folder, f"ray.io_{kind.lower()}s.yaml").read_text())
        (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
        spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
        used = yaml.safe_load((HERE.parents[1] / "cluster" / name).read_text())["spec"]
        found[kind] = shortened(spec, [used])
    # One line a kind.
    lines = [f" {json.dumps(kind)}: {json.dumps(value)}" for kind, value in found.items()]
    (HERE / "kuberay_fields.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
