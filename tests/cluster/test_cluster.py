"""The files of cluster/, as far as they can be checked without a cluster: against Ray's own schema,
the fields that KubeRay publishes, ovref's command line and the versions it is pinned to."""

import copy
import json
import re
import shlex
import tomllib
from importlib import metadata
from pathlib import Path

import jsonschema
import pytest
import yaml

from ovref.config import load
from ovref_pipelines import cli
from ovref_pipelines.recipe import BuildConfig

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
IN_IMAGE = "/opt/ovref/"


PUBLISHED = json.loads((Path(__file__).parent / "kuberay_fields.json").read_text())
"""The schemas of KubeRay's custom resources, as far as the files use them; see `source` in it."""


def read(name):
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def pinned(package):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)[package]


def ray_cluster_of(name):
    tree = read(name)
    return tree["spec"]["rayClusterSpec"] if tree["kind"] == "RayJob" else tree["spec"]


def groups_of(name):
    spec = ray_cluster_of(name)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pod_of(group):
    return group["template"]["spec"]


def container_of(group):
    (container,) = pod_of(group)["containers"]
    return container


KUBERAY = ["rayjob.yaml", "raycluster-dev.yaml"]


# -- KubeRay -----------------------------------------------------------------------------------


def closed(schema):
    """The schema with unknown fields refused, which Kubernetes would silently prune."""
    closed_one = dict(schema)
    if "properties" in schema:
        fields = {name: closed(field) for name, field in schema["properties"].items()}
        closed_one |= {"properties": fields, "additionalProperties": False}
    elif isinstance(schema.get("additionalProperties"), dict):
        closed_one["additionalProperties"] = closed(schema["additionalProperties"])
    if "items" in schema:
        closed_one["items"] = closed(schema["items"])
    return closed_one


def faults_of(tree):
    """What KubeRay's schema finds wrong with a file."""
    # The few `pattern`s of Kubernetes are for quantities, and are regular expressions here too.
    validator = jsonschema.Draft202012Validator(closed(PUBLISHED[tree["kind"]]))
    return [
        f"{'.'.join(map(str, e.path))}: {e.message}" for e in validator.iter_errors(tree["spec"])
    ]


@pytest.mark.parametrize("name", KUBERAY)
def test_the_files_pass_the_schema_that_kuberay_publishes(name):
    tree = read(name)
    assert tree["apiVersion"] == "ray.io/v1"
    assert tree.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert faults_of(tree) == []
    assert ray_cluster_of(name)["authOptions"] == {"mode": "token"}


def test_that_schema_does_refuse_what_is_wrong():
    def spoilt(change):
        tree = read("rayjob.yaml")
        change(tree["spec"])
        return " ".join(faults_of(tree))

    def group(spec):
        return spec["rayClusterSpec"]["workerGroupSpecs"][0]

    assert "backofLimit" in spoilt(lambda spec: spec.update(backofLimit=1))
    assert "'5' is not of type" in spoilt(lambda spec: spec.update(backoffLimit="5"))
    assert "maxReplica" in spoilt(lambda spec: group(spec).update(maxReplica=1))
    assert "is not of type 'string'" in spoilt(
        lambda spec: group(spec)["rayStartParams"].update({"num-cpus": 7})
    )
    pod = "nodeSelectors"
    assert pod in spoilt(lambda spec: group(spec)["template"]["spec"].update({pod: {}}))
    assert "'template' is a required property" in spoilt(lambda spec: group(spec).pop("template"))
    assert "tokens" in spoilt(
        lambda spec: spec["rayClusterSpec"].update(authOptions={"mode": "tokens"})
    )


@pytest.mark.parametrize("name", KUBERAY)
def test_ray_is_one_version_everywhere(name):
    version = ray_cluster_of(name)["rayVersion"]
    assert version == pinned("ray") == metadata.version("ray")
    for group in groups_of(name):
        image = container_of(group)["image"]
        kind = "gpu" if "num-gpus" in group["rayStartParams"] else "cpu"
        assert re.fullmatch(rf"REGISTRY/ovref:[\w.]+-ray{re.escape(version)}-{kind}", image)


@pytest.mark.parametrize("name", KUBERAY)
def test_what_ray_is_told_is_what_the_container_gets(name):
    head, *workers = groups_of(name)
    assert head["rayStartParams"]["num-cpus"] == "0"
    for group in [head, *workers]:
        # Kubernetes and Ray want numbers as text here.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        resources = container_of(group)["resources"]
        for kind in ("requests", "limits"):
            gpus = resources[kind].get("nvidia.com/gpu", "0")
            assert gpus == group["rayStartParams"].get("num-gpus", "0")
            if group is not head:
                assert resources[kind]["cpu"] == group["rayStartParams"]["num-cpus"]
    assert any("num-gpus" in group["rayStartParams"] for group in workers)
    assert any("num-gpus" not in group["rayStartParams"] for group in workers)


@pytest.mark.parametrize("name", KUBERAY)
def test_workers_are_autoscaled_spot_machines_and_the_head_is_not(name):
    assert ray_cluster_of(name)["enableInTreeAutoscaling"] is True
    head, *workers = groups_of(name)
    assert pod_of(head)["nodeSelector"]["karpenter.sh/capacity-type"] == "on-demand"
    for group in workers:
        assert (group["replicas"], group["minReplicas"]) == (0, 0) and group["maxReplicas"] > 0
        assert pod_of(group)["nodeSelector"]["karpenter.sh/capacity-type"] == "spot"
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod_of(
            group
        )["tolerations"]


@pytest.mark.parametrize("name", KUBERAY)
def test_every_pod_has_models_scratch_shared_memory_and_credentials(name):
    for group in groups_of(name):
        pod, container = pod_of(group), container_of(group)
        assert pod["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) == set(volumes)
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        env = {item["name"]: item["value"] for item in container["env"]}
        assert env["HF_HOME"].startswith("/models/") and env["TMPDIR"] in mounts
        # Credentials are in a secret, and nowhere else.
        assert container["envFrom"] == [{"secretRef": {"name": "ovref-s3"}}]
        assert not [name for name in env if "KEY" in name or "TOKEN" in name]
        # Ray's object store must fit into the shared memory.
        assert volumes["shm"]["emptyDir"]["sizeLimit"] == "1Gi"
        assert int(group["rayStartParams"]["object-store-memory"]) < 1 << 30


def test_the_job_s_command_is_one_that_ovref_understands():
    spec = read("rayjob.yaml")["spec"]
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"] is True
    program, *arguments = shlex.split(spec["entrypoint"])
    assert program == "ovref"
    options = cli.parser().parse_args(arguments)
    assert options.verb == "build" and options.config.startswith(IN_IMAGE)
    config = load(BuildConfig, ROOT / options.config.removeprefix(IN_IMAGE), options.overrides)
    assert config.engine.engine == "ray" and config.output.startswith("s3://")
    assert config.corpus.path.startswith("s3://")
    gpu_groups = [g for g in groups_of("rayjob.yaml") if "num-gpus" in g["rayStartParams"]]
    offered = sum(group["maxReplicas"] for group in gpu_groups)
    assert config.engine.workers * config.engine.gpus_per_worker <= offered


# -- virtual machines --------------------------------------------------------------------------


def test_the_launcher_s_file_passes_ray_s_own_checks():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(read("ray-vms.yaml")))
    validate_config(config)
    assert config["available_node_types"]["gpu_spot"]["max_workers"] == 8


def test_ray_s_checks_do_refuse_an_unknown_field():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read("ray-vms.yaml") | {"max_wrokers": 3}
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        validate_config(prepare_config(config))


def test_the_launcher_starts_the_same_kinds_of_machines():
    config = read("ray-vms.yaml")
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    workers = {name: kind for name, kind in types.items() if name != config["head_node_type"]}
    assert sorted(kind["resources"].get("GPU", 0) for kind in workers.values()) == [0, 1]
    for kind in workers.values():
        assert kind["min_workers"] == 0
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    start = " ".join(config["head_start_ray_commands"])
    assert "--num-cpus=0" in start and "--dashboard-host=127.0.0.1" in start
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]
    setup = " ".join(config["setup_commands"])
    assert "constraints.txt" in setup and "[cpu,build]" in setup


# -- runtime environment -----------------------------------------------------------------------


def test_the_runtime_environment_is_one_for_ray():
    from ray.runtime_env import RuntimeEnv

    tree = read("runtime_env.yaml")
    assert RuntimeEnv(**tree).to_dict()["env_vars"] == tree["env_vars"]
    assert not tree.keys() & {"pip", "uv", "conda", "working_dir"}
    with pytest.raises((TypeError, ValueError)):
        RuntimeEnv(env_vars={"A": 1})


# -- image -------------------------------------------------------------------------------------


def instructions():
    """The Dockerfile as (instruction, arguments) in order, continued lines joined."""
    text = (CLUSTER / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in joined]


def test_the_image_is_pinned_has_two_targets_and_no_root():
    stages = {}
    for instruction, arguments in instructions():
        if instruction == "FROM":
            stage = arguments.split(" AS ")[1]
            stages[stage] = []
        else:
            stages[stage].append((instruction, arguments))
    assert list(stages) == ["base", "cpu", "gpu"]
    for target in ("cpu", "gpu"):
        run = " ".join(arguments for name, arguments in stages[target] if name == "RUN")
        installs = [part for part in run.split("&&") if "pip install" in part]
        assert installs and all("--constraint constraints.txt" in part for part in installs)
        assert '".[cpu,build]"' in installs[-1]
        assert ("USER", "1000") in stages[target]
        (command,) = [json.loads(a) for name, a in stages[target] if name == "CMD"]
        assert command[0] == "ovref"


def test_the_gpu_image_can_compile_the_unet_as_a_configuration_asks():
    config = load(BuildConfig, ROOT / "configs" / "fossil_fast.yaml")
    _, gpu = text_of("Dockerfile").split("AS gpu")
    assert config.synthesize.compiled and "apt-get install" in gpu and " g++" in gpu


def test_what_the_image_copies_is_there_and_let_through():
    copied = []
    for instruction, arguments in instructions():
        if instruction == "COPY":
            *sources, target = arguments.split()
            copied += sources
            assert target in ("./", sources[0])
    assert all((ROOT / name).exists() for name in copied)
    ignore = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    assert sorted(line[1:] for line in ignore if line.startswith("!")) == sorted(copied)


@pytest.mark.parametrize("name", ["Dockerfile", "ray-vms.yaml"])
def test_the_nodes_have_the_tagger_of_the_configuration_that_is_run_on_them(name):
    config = load(BuildConfig, ROOT / "configs" / "fossil.yaml")
    spacy = pinned("spacy").rpartition(".")[0]
    wheel = rf"\S+/{config.extract_nouns.tagger}-{re.escape(spacy)}\.\S+\.whl"
    assert re.search(rf"pip install (--quiet )?--no-deps\s+https://{wheel}", text_of(name))


def test_the_extras_that_are_installed_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in ("Dockerfile", "ray-vms.yaml"):
        found = re.findall(r"\[([a-z,]+)\]\"", text_of(name))
        assert found and all(
            set(extras.split(",")) <= project["optional-dependencies"].keys() for extras in found
        )


# -- commands and guide ------------------------------------------------------------------------


def text_of(name):
    return (CLUSTER / name).read_text(encoding="utf-8")


def commands_in(name):
    """What a file tells people to type, in its comments or as an indented block."""
    text = re.sub(r"(?m)^#", " ", text_of(name))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [
        line.strip() for line in lines if re.match(r"\s+(ovref|docker|kubectl|ray) [a-z]", line)
    ]


FILES = sorted(path.name for path in CLUSTER.iterdir() if path.suffix != ".dockerignore")
COMMANDS = [
    command
    for name in FILES
    for command in commands_in(name)
    if command.startswith("ovref ") and IN_IMAGE not in command  # that one has its own test
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_people_are_told_is_one_that_ovref_understands(command):
    words = [word for word in shlex.split(command, comments=True)[1:] if word != "..."]
    options = cli.parser().parse_args(words)
    if hasattr(options, "config"):
        config = load(BuildConfig, ROOT / options.config, options.overrides)
        assert options.verb != "submit" or config.engine.engine == "ray"


def test_there_are_such_commands_and_those_of_docker_name_a_target():
    assert {command.split()[1] for command in COMMANDS} >= {"build", "submit", "status", "gc"}
    builds = [c for name in FILES for c in commands_in(name) if c.startswith("docker build")]
    targets = {arguments.split(" AS ")[1] for name, arguments in instructions() if name == "FROM"}
    assert len(builds) == 4
    for command in builds:
        found = re.match(r"docker build --target (\w+) -f (\S+) -t \S+-(\w+) \.$", command)
        assert found[1] == found[3] and found[1] in targets and (ROOT / found[2]).is_file()


def test_the_files_that_people_are_told_to_apply_are_there():
    told = [c for name in FILES for c in commands_in(name) if re.search("cluster/[a-z]", c)]
    assert len(told) > 5
    for path in re.findall(r"cluster/[\w.-]+", " ".join(told)):
        assert (ROOT / path).is_file(), path


def test_the_guide_s_numbers_of_bytes_are_those_of_the_formats():
    import numpy as np

    from ovref.records import YES, ImageRecord, Noun, Region
    from ovref.storage import codec

    guide = (CLUSTER / "README.md").read_text()
    noun = Noun(text="cup", start=2, end=5)
    region = Region(noun=noun, mask_hw=np.full((512, 512), YES, np.uint8), score=1.0, source="daam")
    record = ImageRecord(
        key="0" * 24, caption="a cup", source="s", image=b"\xff\xd8\xff", seed=1,
        regions=(region,), heatmaps_nhw=np.zeros((1, 64, 64), np.float16),
    )  # fmt: skip
    assert len(codec.encode(record)["heatmaps.npy"]) == 8192 + 128
    assert "8 192" in guide
    assert 2 * (1024 + 768) == 3584 and "3 584" in guide


def test_the_guide_s_size_of_a_caption_is_that_of_its_tar():
    from ovref.records import Caption
    from ovref.storage.shards import ShardFiles

    with ShardFiles() as files:
        for number in range(100):
            text = f"a man rides a brown horse along the beach at sunset, picture {number}"
            files.add(Caption(key=f"{number:024x}", text=text, source=f"captions.json:{number}"))
        size = files.finish([])["tar"].stat().st_size
    assert 0 <= size - 100 * 1024 <= 10240  # a tar ends with up to 20 empty blocks
    assert "1 024" in (CLUSTER / "README.md").read_text()


def test_the_guide_names_every_file_and_every_setting_it_speaks_of_exists():
    guide = (CLUSTER / "README.md").read_text()
    for path in CLUSTER.iterdir():
        if path.suffix != ".dockerignore":
            assert f"`{path.name}`" in guide or path.name == "README.md"
    config = load(BuildConfig, ROOT / "configs" / "fossil.yaml")
    for path in set(re.findall(r"`((?:engine|corpus|synthesize|embed)\.[a-z_.]+)", guide)):
        value = config
        for name in path.split("."):
            assert hasattr(value, name), path
            value = getattr(value, name)
