"""Pages that mkdocs makes of other files of the repository.

`<!-- settings: package.module.Class -->` becomes tables of the settings of a frozen dataclass and
of those that it contains, from their docstrings. `<!-- models -->` becomes the table of known
models, `<!-- fence yaml: path -->` the text of a file, `<!-- docstring: path -->` the docstring of
a module. The results of benchmarks and the guide of the cluster become pages.
"""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PACKAGES = {"ovref": ".", "ovref_inference": "inference", "ovref_pipelines": "pipelines"}
GENERATED = {
    **{
        f"benchmarks/{path.name}": path
        for path in sorted((ROOT / "tests/benchmarks/results").glob("*.md"))
    },
    "guides/cluster.md": ROOT / "cluster/README.md",
}


def on_files(files, config):
    """Adds the generated pages."""
    for uri, path in GENERATED.items():
        # Links to files that are no pages become their text.
        text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)[^)]*\)", r"\1", path.read_text())
        text = re.sub(r"!\[[^\]]*\]\((?:[^)]*/)?(\w+\.png)\)", r"![](../\1)", text)
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown, **_):
    """Replaces the comments that name settings, files and lists of results."""
    markdown = re.sub(r"<!-- settings: (\S+) -->", lambda m: settings(m[1]), markdown)
    markdown = re.sub(
        r"<!-- fence (\w+): (\S+) -->",
        lambda m: f"```{m[1]}\n{(ROOT / m[2]).read_text()}```",
        markdown,
    )
    markdown = re.sub(
        r"<!-- docstring: (\S+) -->",
        lambda m: ast.get_docstring(ast.parse((ROOT / m[1]).read_text())),
        markdown,
    )
    if "<!-- models -->" in markdown:
        markdown = markdown.replace("<!-- models -->", models())
    return markdown.replace("<!-- results -->", results())


def results():
    """A list of the pages of results, by their titles."""
    pages = [(uri, path) for uri, path in GENERATED.items() if uri.startswith("benchmarks/")]
    return "\n".join(
        f"- [{path.read_text().splitlines()[0].lstrip('# ')}]({uri})" for uri, path in pages
    )


def models():
    """The table of models that ovref is known to work with; each row is a test."""
    table, licences = loaded("ovref/known_models/table.py"), loaded("ovref/licences.py")
    lines = ["| model | library | as | licence | note |", "|---|---|---|---|---|"]
    for known in table.ENCODERS:
        cells = (
            f"`{known.model}`",
            known.library,
            ", ".join(known.roles),
            licences.licence_of(known.model),
            known.note,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def loaded(path):
    """A module that imports nothing of the project, which need not be installed here."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def settings(name):
    """Tables of a settings class and of the settings classes in the types of its fields."""
    loader = griffe.GriffeLoader(search_paths=[ROOT / folder for folder in PACKAGES.values()])
    for package in PACKAGES:
        loader.load(package)
    loader.resolve_aliases()
    modules, seen, texts = loader.modules_collection, set(), []

    def visit(found, where):
        if found.path in seen:
            return
        seen.add(found.path)
        rows, inner = [], []
        owners = [*reversed(found.mro()), found]  # settings of the classes it is made from first
        for owner, field in [(o, f) for o in owners for f in o.attributes.values()]:
            if field.annotation is None or field.name.startswith("_") or not field.docstring:
                continue
            if "property" in field.labels or "ClassVar" in str(field.annotation):
                continue
            for part in re.findall(r"[A-Z]\w+", str(field.annotation)):
                target = target_of(owner, part)
                if target is not None:
                    inner.append((target, f"{where}{field.name}."))
            rows.append(row(field))
        summary = found.docstring.value.splitlines()[0] if found.docstring else ""
        prefix = f" (`{where.rstrip('.')}`)" if where else ""
        lines = [f"## {found.name}{prefix}", "", summary, ""]
        lines += ["| setting | type | default | meaning |", "|---|---|---|---|", *rows, ""]
        texts.append("\n".join(lines))
        for target, place in inner:
            visit(target, place)

    def target_of(found, part):
        try:
            target = modules[found.resolve(part)]
            target = target.final_target if target.is_alias else target
        except Exception:  # a name of typing, of the standard library, or a type variable
            return None
        known = target.is_class and target.path.split(".")[0] in PACKAGES
        return target if known and "dataclass" in target.labels else None

    visit(modules[name], "")
    return "\n".join(texts)


def row(field):
    """One line of a table."""
    value = "" if field.value is None else str(field.value)
    if value.startswith("field("):
        made = re.search(r"default_factory=(\w+)", value)
        value = f"{made[1]}()" if made else "see the source"
    cells = (
        f"`{field.name}`",
        f"`{field.annotation}`",
        f"`{value}`" if value else "required",
        " ".join(field.docstring.value.split()),
    )
    return "| " + " | ".join(cells) + " |"
