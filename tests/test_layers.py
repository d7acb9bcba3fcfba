"""Who may import whom, what imports stay light, and what an installation adds."""

import ast
import graphlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "ovref": "ovref",
    "ovref_inference": "inference/ovref_inference",
    "ovref_pipelines": "pipelines/ovref_pipelines",
}
MAY_IMPORT = {
    "ovref_inference": {"ovref_inference"},
    "ovref": {"ovref", "ovref_inference"},
    "ovref_pipelines": {"ovref", "ovref_inference", "ovref_pipelines"},
}
FLOORS = {
    "ovref_inference": (
        {
            "errors", "lazy", "vectors", "images", "models", "pictures", "pixels", "places",
            "ranges",
        },
        {"encoders"},
        {"collection", "proposers"},
        {"segmenters"},
    ),
    "ovref": (
        {
            "ahead", "errors", "class_files", "config", "contract", "devices", "identity",
            "licences", "locations", "meter", "print_config", "records", "stored_images",
        },
        {"ops", "storage"},
        {"miniature", "models", "run_shard", "ingest", "check_models"},
        {"corpora", "known_models", "select_prompts", "stages"},
        {"reduce", "evaluation"},
        {"exchange", "labelled_corpora", "training"},
    ),
    "ovref_pipelines": (
        {"errors", "console", "shipped", "tool_arguments", "bar"},
        {"engine"},
        {"ray", "output", "preflight", "live"},
        {"build_config"},
        {"folders"},
        {"provenance"},
        {"recipe"},
        {"verbs"},
        {"api", "explore"},
        {"commands", "tool_commands"},
        {"cli"},
        {"__main__"},
    ),
}
"""The rooms of each package, from the ground floor up; those of one floor do not import each other,
but for the single modules of the ground floor."""
HEAVY = ("torch", "transformers", "diffusers", "open_clip", "spacy", "scipy", "PIL", "ray")


def imports_of(path):
    """Top-level names of all modules that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def modules_of(package):
    return sorted((ROOT / FOLDERS[package]).rglob("*.py"))


def import_graph(package):
    """Which modules of the package each of its modules imports, anywhere in it."""
    folder = ROOT / FOLDERS[package]
    names = {}
    for path in modules_of(package):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        names[".".join(parts).removesuffix(".__init__")] = path
    graph = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} has a relative import"
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (inner & names.keys()) or {node.module}
        graph[name] = (found & names.keys()) - {name}
    return graph


def floor_of(module, floors):
    """Number of the module's floor; the package itself, which re-exports, is the roof."""
    room = module.split(".")[1] if "." in module else None
    found = [number for number, rooms in enumerate(floors) if room in rooms]
    assert len(found) == 1 or room is None, f"{module} stands in no room of FLOORS"
    return found[0] if found else len(floors)


def loaded_by(statement):
    """Which of the heavy libraries are loaded by a statement in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*[n for n in {HEAVY} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("package", FOLDERS)
def test_no_module_imports_a_layer_above_its_own(package):
    for path in modules_of(package):
        found = set(imports_of(path)) & FOLDERS.keys()
        assert found <= MAY_IMPORT[package], path


@pytest.mark.parametrize("package", FOLDERS)
def test_no_module_imports_itself_by_way_of_others(package):
    graphlib.TopologicalSorter(import_graph(package)).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize("package", FOLDERS)
def test_no_room_imports_one_beside_or_above_it(package):
    # The engine reaches the room `ray` by name at run time (`run_steps.ray_module`), so that ray is
    # loaded only where it is the engine.
    floors = FLOORS[package]
    for module, imported in import_graph(package).items():
        for other in imported:
            same_room = module.split(".")[:2] == other.split(".")[:2]
            here, there = floor_of(module, floors), floor_of(other, floors)
            assert same_room or there < here or here == 0 == there, f"{module} imports {other}"


@pytest.mark.parametrize("package", FOLDERS)
def test_every_room_is_there(package):
    names = {path.stem for path in (ROOT / FOLDERS[package]).iterdir()} - {"__pycache__"}
    assert names - {"__init__", "py"} == set().union(*FLOORS[package])


def test_ray_is_imported_in_few_modules_of_pipelines():
    users = [p for package in FOLDERS for p in modules_of(package) if "ray" in imports_of(p)]
    assert [str(path.relative_to(ROOT)) for path in users] == [
        "pipelines/ovref_pipelines/ray/cluster.py",
        "pipelines/ovref_pipelines/ray/engine.py",
        "pipelines/ovref_pipelines/ray/metrics.py",
        "pipelines/ovref_pipelines/ray/reports.py",
        "pipelines/ovref_pipelines/ray/tasks.py",
        "pipelines/ovref_pipelines/ray/training_group.py",
        "pipelines/ovref_pipelines/ray/workers.py",
        "pipelines/ovref_pipelines/verbs/jobs.py",
        "pipelines/ovref_pipelines/verbs/submit.py",
    ]


def test_nothing_is_ever_unpickled():
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
    for package in FOLDERS:
        for path in modules_of(package):
            assert not forbidden & set(imports_of(path)), path


def test_the_light_half_loads_no_heavy_library():
    assert loaded_by("import ovref_inference") == set()


def test_stages_are_data_until_they_are_built():
    stages = sorted(p.stem for p in (ROOT / "ovref/stages").glob("*.py") if p.stem != "__init__")
    assert stages
    statement = "\n".join(f"import ovref.stages.{name}" for name in stages)
    assert loaded_by(statement) <= {"PIL"}


def test_recipe_and_local_engine_need_neither_torch_nor_ray():
    assert loaded_by("import ovref_pipelines.recipe, ovref_pipelines.cli") <= {"PIL"}


def test_help_imports_next_to_nothing():
    statement = "import ovref_pipelines.cli; ovref_pipelines.cli.parser()"
    assert loaded_by(statement + "; assert 'numpy' not in sys.modules") == set()


def test_an_installation_adds_these_packages_and_no_others():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    wheel = wheel["targets"]["wheel"]
    assert sorted(wheel["packages"]) == sorted(FOLDERS.values())
    # In a checkout the same packages are found by a plain path file.
    parents = {str(Path(folder).parent) for folder in FOLDERS.values()}
    assert set(wheel["dev-mode-dirs"]) == parents


def test_every_folder_of_modules_is_a_package():
    for package in FOLDERS:
        for path in modules_of(package):
            assert (path.parent / "__init__.py").is_file(), path.parent


def test_every_package_says_that_it_is_typed():
    for folder in FOLDERS.values():
        assert (ROOT / folder / "py.typed").is_file()
