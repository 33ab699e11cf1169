"""The package as it is installed: what an import brings along, and the order of its folders."""

import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser

import pytest
from paths import PACKAGE, ROOT

import torch_hf

#: Prints which modules an import brings beside torch's, and whether it left the settings alone.
IMPORT = """
import json, logging, random, sys, warnings, torch

def state():
    return (
        torch.get_rng_state().sum().item(),
        random.getstate(),
        warnings.filters[:],
        logging.root.handlers[:],
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )

settings, modules = state(), set(sys.modules)  # torch itself looks for tqdm
import torch_hf
print(json.dumps({"modules": [*set(sys.modules) - modules], "same": state() == settings}))
"""


@pytest.fixture(scope="module")
def imported():
    """What a new interpreter tells of ``import torch_hf``."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


def test_an_import_brings_nothing_but_the_package(imported):
    found = {name.partition(".")[0] for name in imported["modules"]}
    # the standard library is free; torch has whatever else is needed in it
    assert found - sys.stdlib_module_names == {"torch_hf"}


def test_what_is_optional_is_imported_where_it_is_used(imported):
    optional = {"torch_hf.plotting", "torch_hf.plotting.panels", "torch_hf.kronecker"}
    optional |= {"torch_hf.__main__", "torchvision", "matplotlib", "pandas", "lightning"}
    optional |= {"transformers", "tqdm", "tensorboard", "sklearn"}
    assert optional & set(imported["modules"]) == set()


def test_an_import_brings_few_modules(imported):
    """Counted, not timed: a busy machine is slow, and has no more modules than an idle one."""
    others = [name for name in imported["modules"] if name.partition(".")[0] != "torch_hf"]
    assert len(others) <= 10  # none when this was written, beside torch's own 1,200


def test_an_import_changes_no_settings(imported):
    assert imported["same"]


# --- the folders ----------------------------------------------------------------------------


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source, above, names):
    """The modules among ``names`` that a source imports anywhere: in functions, for type checkers.

    ``above`` are the names of the packages that it lies in, outermost first.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = above[: len(above) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            inner = {f"{module}.{alias.name}" for alias in node.names}
            found |= inner & names or {module}  # `from torch_hf import _checks` is of _checks
    return found & names


FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = {path: path.read_text(encoding="utf-8") for path in FILES}
NAMES = {name_of(path) for path in FILES}
GRAPH = {
    name_of(path): imports(source, path.relative_to(ROOT).parent.parts, NAMES)
    for path, source in SOURCES.items()
}


def room_of(name):
    """The folder a module lies in, or the module itself where it lies beside the folders."""
    return name.split(".")[1] if "." in name else "torch_hf"


ROOMS = {}
for _name, _found in GRAPH.items():
    _beyond = {room_of(other) for other in _found} - {room_of(_name)}
    ROOMS[room_of(_name)] = ROOMS.get(room_of(_name), set()) | _beyond


def reach(name, graph):
    """All that a module or folder imports, and what these import."""
    seen, ahead = set(), [name]
    while ahead:
        for found in graph[ahead.pop()] - seen:
            seen.add(found)
            ahead.append(found)
    return seen


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from p.a import x", {"p.a"}),
        ("from p import b", {"p.b"}),
        ("import p.b.c as d", {"p.b.c"}),
        ("from .c import x", {"p.b.c"}),
        ("from ..a import x", {"p.a"}),
        ("def f():\n    from p.a import x", {"p.a"}),
        ("if TYPE_CHECKING:\n    from p.a import x", {"p.a"}),
        ("import q, torch", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(source, found):
    assert imports(source, ("p", "b"), {"p", "p.a", "p.b", "p.b.c"}) == found


@pytest.mark.parametrize("graph", [GRAPH, ROOMS], ids=["files", "folders"])
def test_imports_have_no_cycle(graph):
    assert [name for name in graph if name in reach(name, graph)] == []


#: What all may import: values, vectors, checks.
GROUND = ("_version", "_messages", "_user_warnings", "_checks", "report", "vector")
#: The story of a step, in the order in which it happens; `diagnose` looks at all but its end.
STORY = ("capture", "loss", "statistics", "objective", "curvature", "preconditioner", "solver")
ORDER = (*GROUND, "capture", "distributed", *STORY[1:], "diagnostics", "optimizer")
#: Beside the story: what these import is all that they need.
BESIDE = {
    "sampling": {"_checks", "report"},
    "tracking": {"report"},
    "plotting": {"tracking"},
    "kronecker": {"_checks", "distributed"},
    "checkpoint": set(),
    "__main__": {"torch_hf", "_messages", "diagnostics", "plotting", "tracking"},
}
#: Names of former versions, which lead to a folder of today.
OLD_NAMES = {
    "growth": {"sampling"},
    "reduce": {"distributed"},
    "kronecker_base": {"preconditioner"},
}


def test_every_folder_has_its_place():
    assert {*ORDER, *BESIDE, *OLD_NAMES, "torch_hf"} == ROOMS.keys()


@pytest.mark.parametrize("room", ORDER)
def test_folders_import_one_way(room):
    assert ROOMS[room] <= set(ORDER[: ORDER.index(room)])


@pytest.mark.parametrize(("room", "allowed"), (BESIDE | OLD_NAMES).items())
def test_what_lies_beside_the_story_imports_little(room, allowed):
    assert ROOMS[room] <= allowed


def test_cg_knows_no_network():
    """Of the networks' side the solver sees a protocol alone."""
    of_networks = {f"torch_hf.{room}" for room in STORY[: STORY.index("preconditioner")]}
    seen = reach("torch_hf.solver.cg", GRAPH)
    walks = {f"torch_hf.capture.{name}" for name in ("autograd_graph", "op_names")}
    assert {n for n in seen if ".".join(n.split(".")[:2]) in of_networks} <= walks


def test_only_the_door_imports_the_optimizer():
    assert [room for room, found in ROOMS.items() if "optimizer" in found] == ["torch_hf"]


def test_only_one_folder_speaks_to_other_ranks():
    def speaks(source):
        nodes = list(ast.walk(ast.parse(source)))
        written = [ast.unparse(n) for n in nodes if isinstance(n, (ast.Attribute, ast.Import))]
        written += [
            f"{n.module}.{alias.name}"
            for n in nodes
            if isinstance(n, ast.ImportFrom)
            for alias in n.names
        ]
        return any("torch.distributed" in text.removeprefix("import ") for text in written)

    rooms = {room_of(name_of(path)) for path, source in SOURCES.items() if speaks(source)}
    assert rooms == {"distributed"}


def test_the_architecture_names_every_file():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    inside = [path.relative_to(PACKAGE).as_posix() for path in FILES]
    files = [file for file in inside if not file.endswith(("__init__.py", "_version.py"))]
    missing = [f for f in files if not re.search(rf"(?<![\w/]){re.escape(f)}\b", page)]
    assert missing == []


# --- said once ------------------------------------------------------------------------------


def test_the_version_stands_in_one_place():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert setup["metadata"]["version"] == "attr: torch_hf._version.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", torch_hf.__version__)
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{torch_hf.__version__}]" in log
    said = f'"{torch_hf.__version__}"'
    assert [p.name for p in FILES if said in p.read_text(encoding="utf-8")] == ["_version.py"]


def test_the_marker_of_types_is_shipped():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert (PACKAGE / "py.typed").is_file()
    assert "py.typed" in setup["options.package_data"]["torch_hf"]
