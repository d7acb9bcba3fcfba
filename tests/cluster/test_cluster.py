"""The files of cluster/, as far as they can be checked without a cluster: against Ray's own schema,
the fields that KubeRay publishes, ovref's command line and the versions it is pinned to."""

import copy
import json
import os
import re
import shlex
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml

from ovref.config import load
from ovref_pipelines import cli
from ovref_pipelines.ray.workers import Worker
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
def test_what_ray_is_given_is_what_the_container_gets(name):
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
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) == set(volumes)
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        env = {item["name"]: item["value"] for item in container["env"]}
        assert env["HF_HOME"].startswith("/models/") and env["TMPDIR"] in mounts
        # Access comes from a service account's role; keys, where they must be, from a secret.
        assert pod["serviceAccountName"] == "ovref"
        assert container["envFrom"] == [{"secretRef": {"name": "ovref-s3", "optional": True}}]
        assert not [name for name in env if "KEY" in name or "TOKEN" in name]
        # Ray's object store must fit into the shared memory.
        assert volumes["shm"]["emptyDir"]["sizeLimit"] == "1Gi"
        assert int(group["rayStartParams"]["object-store-memory"]) < 1 << 30


def pods_and_containers(name):
    """Every pod of a file, and every security context of a container that KubeRay makes of it."""
    spec, cluster = read(name)["spec"], ray_cluster_of(name)
    pods = [pod_of(group) for group in groups_of(name)]
    if "entrypoint" in spec:
        pods.append(spec["submitterPodTemplate"]["spec"])
    containers = [container for pod in pods for container in pod["containers"]]
    return pods, [*containers, cluster["autoscalerOptions"]]


@pytest.mark.parametrize("name", KUBERAY)
def test_everything_passes_the_pod_security_standard_restricted(name):
    pods, containers = pods_and_containers(name)
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        for volume in pod.get("volumes", []):
            assert volume.keys() & {"emptyDir", "persistentVolumeClaim"}
    for container in containers:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("name", KUBERAY)
def test_every_container_says_how_much_local_disk_it_needs(name):
    pods, _ = pods_and_containers(name)
    for container in (container for pod in pods for container in pod["containers"]):
        for kind in ("requests", "limits"):
            assert container["resources"][kind]["ephemeral-storage"].endswith("Gi")


@pytest.mark.parametrize("name", KUBERAY)
def test_a_worker_that_is_removed_has_the_time_of_a_shard_to_finish(name):
    shard_seconds = 15 * 60  # the guide's longest
    for group in groups_of(name)[1:]:
        hook = container_of(group)["lifecycle"]["preStop"]["exec"]["command"]
        assert hook[0].startswith(IN_IMAGE)
        assert os.access(ROOT / hook[0].removeprefix(IN_IMAGE), os.X_OK)
        patience = int(hook[1])
        assert patience >= shard_seconds
        assert pod_of(group)["terminationGracePeriodSeconds"] >= patience + 30


@pytest.mark.parametrize("name", KUBERAY)
def test_spot_taints_of_azure_and_google_are_tolerated(name):
    for group in groups_of(name)[1:]:
        taints = {(t["key"], t.get("value")) for t in pod_of(group)["tolerations"]}
        assert ("kubernetes.azure.com/scalesetpriority", "spot") in taints
        assert ("cloud.google.com/gke-spot", "true") in taints


def test_the_service_account_may_change_its_own_job_and_nothing_else():
    account, role, binding = yaml.safe_load_all(text_of("service-account.yaml"))
    job = read("rayjob.yaml")
    assert account["kind"] == "ServiceAccount"
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account["metadata"]["name"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert role["rules"] == [
        {
            "apiGroups": ["ray.io"],
            "resources": ["rayjobs"],
            "resourceNames": [job["metadata"]["name"]],
            "verbs": ["patch"],
        }
    ]
    head, *workers = groups_of("rayjob.yaml")
    env = {item["name"]: item["value"] for item in container_of(head)["env"]}
    assert env["RAYJOB"] == job["metadata"]["name"]
    assert all(pod_of(group)["automountServiceAccountToken"] is False for group in workers)


def test_the_job_s_command_is_one_that_ovref_understands():
    spec = read("rayjob.yaml")["spec"]
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"] is True
    wrapper, program, *arguments = shlex.split(spec["entrypoint"])
    assert wrapper == f"{IN_IMAGE}cluster/run_job.sh" and program == "ovref"
    # KubeRay pastes the command into a shell line.
    assert not set(";&|$`'\"") & set(spec["entrypoint"])
    options = cli.parse(arguments)
    assert options.verb == "build" and options.config.startswith(IN_IMAGE)
    config = load(BuildConfig, ROOT / options.config.removeprefix(IN_IMAGE), options.overrides)
    assert config.engine.engine == "ray" and config.output.startswith("s3://")
    assert config.corpus.path.startswith("s3://")
    gpu_groups = [g for g in groups_of("rayjob.yaml") if "num-gpus" in g["rayStartParams"]]
    offered = sum(group["maxReplicas"] for group in gpu_groups)
    # A ceiling well above, and so not the same number a second time.
    assert config.engine.workers * config.engine.gpus_per_worker <= offered / 2


# -- scripts of the image ----------------------------------------------------------------------


def run_script(tmp_path, name, *arguments, **programs):
    """Runs a script with stand-ins for programs (name=shell text) that log how they are called."""
    for program, text in programs.items():
        path = tmp_path / program
        path.write_text(f'#!/bin/sh\necho {program} "$@" >> {tmp_path}/calls\n{text}\n')
        path.chmod(0o755)
    for key in ("token", "namespace"):
        (tmp_path / key).write_text(f"the-{key}")
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RAYJOB": "ovref-fossil",
        "ACCOUNT_DIR": str(tmp_path),
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "KUBERNETES_SERVICE_PORT": "443",
    }
    done = subprocess.run(
        [CLUSTER / name, *arguments], env=env, capture_output=True, text=True, timeout=60
    )
    return done, (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize("code", [0, 1, 130])
def test_a_job_that_may_be_retried_keeps_its_retries(tmp_path, code):
    done, calls = run_script(
        tmp_path, "run_job.sh", "ovref", "build", "a=b c", ovref=f"exit {code}", wget=""
    )
    assert done.returncode == code and calls == ["ovref build a=b c"]


def test_a_wrong_setting_takes_the_retries_from_the_job(tmp_path):
    done, calls = run_script(tmp_path, "run_job.sh", "ovref", "build", ovref="exit 2", wget="")
    assert done.returncode == 2 and done.stderr == ""
    _, patch = calls
    assert patch.startswith("wget ") and "--method=PATCH" in patch
    assert "Authorization: Bearer the-token" in patch
    assert json.loads(re.search(r"--body-data=(\S+)", patch)[1]) == {"spec": {"backoffLimit": 0}}
    assert patch.endswith(
        "https://10.0.0.1:443/apis/ray.io/v1/namespaces/the-namespace/rayjobs/ovref-fossil"
    )


def test_retries_that_cannot_be_taken_are_reported_and_the_exit_code_stays(tmp_path):
    done, _ = run_script(tmp_path, "run_job.sh", "ovref", ovref="exit 2", wget="exit 8")
    assert done.returncode == 2
    assert "cannot stop the retries of RayJob ovref-fossil" in done.stderr


def test_a_pod_that_is_removed_waits_for_its_worker(tmp_path):
    # Ray calls its processes `ray::<class>`, which the test does for one that sleeps.
    assert Worker.__name__ == "Worker"
    working = subprocess.Popen(["bash", "-c", "exec -a ray::Worker.run sleep 2"])
    done, (call,) = run_script(tmp_path, "drain.sh", "30", ray="")
    assert working.poll() == 0 and done.returncode == 0
    assert "drain-node" in call and "--deadline-remaining-seconds 30" in call


def test_a_pod_waits_no_longer_than_it_may(tmp_path):
    working = subprocess.Popen(["bash", "-c", "exec -a ray::Worker.run sleep 30"])
    done, _ = run_script(tmp_path, "drain.sh", "1", ray="")
    assert working.poll() is None and done.returncode == 0
    working.kill()
    working.wait()


# -- virtual machines --------------------------------------------------------------------------


def test_the_launcher_s_file_passes_ray_s_own_checks():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(read("ray-vms.yaml")))
    validate_config(config)
    for kind in ("gpu_spot", "cpu_spot"):  # the one ceiling of the file
        assert config["available_node_types"][kind]["max_workers"] == config["max_workers"]


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
    # The head must be allowed to give the workers their role.
    head = types[config["head_node_type"]]["node_config"]
    assert head["IamInstanceProfile"] == {"Name": "ovref-head"}
    allowed = {
        action: statement["Resource"]
        for statement in json.loads(text_of("aws-head-policy.json"))["Statement"]
        for action in np.atleast_1d(statement["Action"])
    }
    assert "ec2:RunInstances" in allowed
    for kind in workers.values():
        profile = kind["node_config"]["IamInstanceProfile"]["Name"]
        assert allowed["iam:PassRole"].endswith(f":role/{profile}")
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


def stages_of_the_image():
    """Name of each build stage -> the stage it starts from and its instructions."""
    stages = {}
    for instruction, arguments in instructions():
        if instruction == "FROM":
            parent, name = arguments.split(" AS ")
            stages[name] = (parent, [])
        else:
            stages[name][1].append((instruction, arguments))
    return stages


def test_the_image_is_pinned_has_two_targets_and_no_root():
    stages = stages_of_the_image()
    assert list(stages) == ["base", "cpu-dependencies", "gpu-dependencies", "code", "cpu", "gpu"]
    for target in ("cpu", "gpu"):
        parent, own = stages[target]
        assert parent == f"{target}-dependencies" and stages[parent][0] == "base"
        run = " ".join(arguments for name, arguments in stages[parent][1] if name == "RUN")
        installs = [part for part in run.split("&&") if "pip install" in part]
        assert installs and all("--constraint constraints.txt" in part for part in installs)
        assert '".[cpu,build]"' in installs[-1]
        assert ("USER", "1000") in own
        (command,) = [json.loads(a) for name, a in own if name == "CMD"]
        assert command[0] == "ovref"


def test_a_change_of_code_rebuilds_no_layer_of_dependencies():
    stages = stages_of_the_image()
    for target in ("cpu", "gpu"):
        _, own = stages[target]
        (run,) = [arguments for name, arguments in own if name == "RUN"]
        assert "--no-deps" in run and "--no-build-isolation" in run and "apt-get" not in run
        for name in ("base", f"{target}-dependencies"):
            copied = [a for instruction, a in stages[name][1] if instruction == "COPY"]
            assert copied == (["constraints.txt pyproject.toml ./"] if name == "base" else [])


def test_the_gpu_image_can_compile_the_unet_as_a_configuration_asks():
    config = load(BuildConfig, ROOT / "configs" / "fossil_fast.yaml", ["corpus.path=captions.txt"])
    _, gpu = text_of("Dockerfile").split("AS gpu-dependencies")
    assert config.synthesize.compiled and "apt-get install" in gpu and " g++" in gpu


def test_what_the_image_copies_is_there_and_let_through():
    copied = []
    for instruction, arguments in instructions():
        if instruction == "COPY" and arguments != "--from=code / ./":
            *sources, target = arguments.split()
            copied += sources
            assert target in ("./", "/", f"/{sources[0]}")
    assert all((ROOT / name).exists() for name in copied)
    ignore = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    assert sorted(line[1:] for line in ignore if line.startswith("!")) == sorted(copied)


@pytest.mark.parametrize("name", ["Dockerfile", "ray-vms.yaml"])
def test_the_nodes_have_the_tagger_of_the_configuration_that_is_run_on_them(name):
    config = load(BuildConfig, ROOT / "configs" / "fossil.yaml", ["corpus.path=captions.txt"])
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
    """The commands that a file shows, in its comments or as an indented block."""
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
def test_every_command_that_people_are_shown_is_one_that_ovref_understands(command):
    words = [word for word in shlex.split(command, comments=True)[1:] if word != "..."]
    options = cli.parse(words)
    if hasattr(options, "config"):
        given = options.overrides
        if command.endswith(" ..."):  # what is left out names the corpus
            given = [*given, "corpus.path=captions.txt"]
        config = load(BuildConfig, ROOT / options.config, given)
        assert options.verb != "submit" or config.engine.engine == "ray"


def test_there_are_such_commands_and_those_of_docker_name_a_target():
    assert {command.split()[1] for command in COMMANDS} >= {"build", "submit", "status", "gc"}
    builds = [c for name in FILES for c in commands_in(name) if c.startswith("docker build")]
    targets = {arguments.split(" AS ")[1] for name, arguments in instructions() if name == "FROM"}
    assert len(builds) == 4
    for command in builds:
        found = re.match(r"docker build --target (\w+) -f (\S+) -t \S+-(\w+) \.$", command)
        assert found[1] == found[3] and found[1] in targets and (ROOT / found[2]).is_file()


def test_the_files_that_people_are_asked_to_apply_are_there():
    commands = [c for name in FILES for c in commands_in(name) if re.search("cluster/[a-z]", c)]
    assert len(commands) > 5
    for path in re.findall(r"cluster/[\w.-]+", " ".join(commands)):
        assert (ROOT / path).is_file(), path


def test_the_guide_s_numbers_of_bytes_are_those_of_the_formats():
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
    config = load(BuildConfig, ROOT / "configs" / "fossil.yaml", ["corpus.path=captions.txt"])
    for path in set(re.findall(r"`((?:engine|corpus|synthesize|embed)\.[a-z_.]+)", guide)):
        value = config
        for name in path.split("."):
            assert hasattr(value, name), path
            value = getattr(value, name)
