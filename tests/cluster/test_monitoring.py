"""The files for Prometheus and Grafana: their metrics are those that the engine and Ray export."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from ovref_pipelines.ray import metrics

CLUSTER = Path(__file__).parents[2] / "cluster"
KINDS = {name: value for name, value in vars(metrics).items() if name.isupper()}
OURS = {f"ray_{name}" for name in KINDS.values()}


def of_ray():
    """Names of the metrics that Ray's agent of each node exports, read from its source."""
    spec = importlib.util.find_spec("ray.dashboard.modules.reporter.reporter_agent")
    tree = ast.parse(Path(spec.origin).read_text())
    (gauges,) = [
        node.value for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "METRICS_GAUGES"
    ]  # fmt: skip
    return {f"ray_{key.value}" for key in gauges.keys}


def documents():
    return list(yaml.safe_load_all((CLUSTER / "monitoring.yaml").read_text(encoding="utf-8")))


def rules():
    (group,) = documents()[1]["spec"]["groups"]
    return group["rules"]


def dashboard():
    return json.loads((CLUSTER / "grafana-dashboard.json").read_text(encoding="utf-8"))


def expressions():
    found = {rule["alert"]: rule["expr"] for rule in rules()}
    for panel in dashboard()["panels"]:
        found |= {f"{panel['title']} {t['refId']}": t["expr"] for t in panel["targets"]}
    return found


@pytest.mark.parametrize("name", expressions())
def test_every_metric_is_one_that_is_exported(name):
    named = set(re.findall(r"\bray_\w+", expressions()[name]))
    assert named and named <= OURS | of_ray()


def test_every_metric_of_the_engine_is_shown():
    text = " ".join(expressions().values())
    assert {name for name in OURS if name not in text} == set()


@pytest.mark.parametrize("name", expressions())
def test_expressions_group_by_labels_that_the_metrics_have(name):
    expression = expressions()[name]
    labels = {"step", "build", "instance", "GpuIndex"}
    if "drops" in expression:
        labels |= {"reason"}
    if "trouble" in expression:
        labels |= {"what"}
    grouped = re.findall(r"(?:by|on) \(([^)]*)\)", expression)
    assert {label.strip() for group in grouped for label in group.split(",")} <= labels
    assert expression.count("(") == expression.count(")")


def test_a_counter_is_never_shown_without_its_growth():
    for expression in expressions().values():
        for counter in (name for name in OURS if name.endswith("_total")):
            for found in re.finditer(counter, expression):
                assert re.search(r"(rate|increase)\($", expression[: found.start()])


def test_the_exported_names_are_those_of_ray_s_meter():
    """Prometheus sees `ray_` before a name, and `_total` after a counter's."""
    source = Path(metrics.__file__).read_text()
    counters = set(re.findall(r"counter\((\w+),", source)) - {"name"}
    gauges = set(re.findall(r"gauge\((\w+),", source)) - {"name"}
    assert counters | gauges == set(KINDS)
    assert all(KINDS[name].endswith("_total") == (name in counters) for name in KINDS)


def test_three_alerts_and_each_says_what_to_look_at():
    assert [rule["alert"] for rule in rules()] == [
        "OvrefBuildStalled", "OvrefTrouble", "OvrefManyDrops",
    ]  # fmt: skip
    assert all(rule["annotations"].keys() == {"summary", "description"} for rule in rules())


def test_the_monitor_finds_the_pods_of_a_ray_cluster():
    monitor = documents()[0]
    assert monitor["kind"] == "PodMonitor"
    (selected,) = monitor["spec"]["selector"]["matchExpressions"]
    assert selected["key"] == "ray.io/node-type" and selected["values"] == ["head", "worker"]


def test_panels_do_not_overlap():
    taken = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert not cells & taken and max(x for x, _ in cells) < 24
        taken |= cells
