"""The package as it is installed: what an import brings along, and that imports point down."""

import ast
import re
import subprocess
import sys
from configparser import ConfigParser

import pytest
from paths import PACKAGE, ROOT

import torch_hf


def fresh(code):
    """What a new interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.split()


def test_an_import_brings_nothing_but_the_package():
    found = fresh(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import torch_hf\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    # the standard library is free; torch has whatever else is needed in it
    assert {name for name in found if name not in sys.stdlib_module_names} == {"torch_hf"}


def test_what_is_optional_is_imported_where_it_is_used():
    optional = [
        "torch_hf.plotting",
        "torch_hf.plotting.panels",
        "torch_hf.kronecker",
        "torch_hf.__main__",
    ]
    optional += ["torchvision", "matplotlib", "pandas", "lightning", "transformers", "tqdm"]
    found = fresh(
        "import sys, torch\n"
        "before = set(sys.modules)\n"  # torch itself looks for tqdm
        "import torch_hf\n"
        f"print(*(set({optional}) & (set(sys.modules) - before)))"
    )
    assert found == []


def test_an_import_is_quick():
    seconds = fresh(
        "import time, torch\n"
        "start = time.perf_counter()\n"
        "import torch_hf\n"
        "print(time.perf_counter() - start)"
    )
    # 0.05 s on one core when this was written, beside torch's own 1.4 s
    assert float(seconds[0]) < 1.0


def test_an_import_changes_no_settings():
    assert fresh(
        "import random, warnings, logging, torch\n"
        "def state():\n"
        "    return (torch.get_rng_state().sum().item(), random.getstate(),\n"
        "            warnings.filters[:],\n"
        "            logging.root.handlers[:], torch.get_default_dtype(),\n"
        "            torch.get_num_threads(),\n"
        "            torch.are_deterministic_algorithms_enabled())\n"
        "before = state()\n"
        "import torch_hf\n"
        "print(state() == before)"
    ) == ["True"]


# --- the floors -----------------------------------------------------------------------------


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, names):
    """The package's modules that a file imports; those for type checkers only are left out."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checking = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in checking:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            inner = {f"{module}.{alias.name}" for alias in node.names}
            found |= inner & names or {module}  # `from torch_hf import _checks` is of _checks
    return found & names


FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = {name_of(path) for path in FILES}
GRAPH = {name_of(path): imports(path, NAMES) for path in FILES}
WING = "torch_hf.kronecker"


def reach(name):
    """All that a module imports, and what these import."""
    seen, ahead = set(), [name]
    while ahead:
        for found in GRAPH[ahead.pop()] - seen:
            seen.add(found)
            ahead.append(found)
    return seen


def test_imports_have_no_cycle():
    assert [name for name in GRAPH if name in reach(name)] == []


#: Who may be reached from whom; anything else is a new story for docs/architecture.md.
CHECKS = {f"torch_hf.{name}" for name in ("_checks", "checks", "_messages", "_foreign")}
GROUND = CHECKS | {f"torch_hf.{name}" for name in ("report", "clock", "_version")}
REDUCE = {name for name in NAMES if f"{name}.".startswith("torch_hf.distributed.")}
WALKS = {f"torch_hf.capture.{name}" for name in ("autograd_graph", "op_names")}
LOW = GROUND | REDUCE | WALKS | {"torch_hf.vector", "torch_hf.capture"}
RECORDED = LOW | {
    f"torch_hf.{name}" for name in ("capture", "convolution", "heads", "names", "terms")
}
FACTORS = RECORDED | {f"torch_hf.{name}" for name in ("factors", "signs", "patches", "per_case")}
FLOORS = [
    *((name, set()) for name in sorted(CHECKS)),
    ("torch_hf.report", GROUND),
    ("torch_hf.vector", GROUND),
    ("torch_hf.capture.op_names", set()),
    ("torch_hf.capture.autograd_graph", {"torch_hf.capture.op_names"}),
    ("torch_hf.loss.linear_terms", WALKS | {"torch_hf.capture"}),
    ("torch_hf.loss.loss_hessians", {"torch_hf.capture.op_names", "torch_hf.loss.linear_terms"}),
    *((name, LOW) for name in sorted(REDUCE)),
    ("torch_hf.solver.trust_region", LOW),
    ("torch_hf.solver.cg", LOW),  # knows no network
    ("torch_hf.preconditioner.lbfgs_pairs", LOW),
    ("torch_hf.statistics.case_signs", set()),
    ("torch_hf.statistics.layer_rows", RECORDED),
    ("torch_hf.statistics.kronecker_factors", FACTORS),
    ("torch_hf.preconditioner.kfac", FACTORS),
    ("torch_hf.sampling.growth", GROUND),
    ("torch_hf.sampling.sampler", GROUND | {"torch_hf.sampling.growth"}),
    ("torch_hf.sampling.batches", LOW),
    ("torch_hf.tracking", GROUND),
    ("torch_hf.plotting.panels", GROUND | {"torch_hf.tracking"}),
    ("torch_hf.plotting", GROUND | {"torch_hf.tracking", "torch_hf.plotting.panels"}),
    ("torch_hf.checkpoint", LOW),
]


@pytest.mark.parametrize(("module", "allowed"), FLOORS, ids=[name for name, _ in FLOORS])
def test_imports_point_down(module, allowed):
    assert reach(module) <= allowed


def test_only_the_door_imports_the_optimizer():
    assert [n for n, found in GRAPH.items() if "torch_hf.optimizer.hf" in found] == ["torch_hf"]


def test_the_kronecker_wing_stands_on_the_lowest_floors():
    wing = {name for name in GRAPH if f"{name}.".startswith(f"{WING}.")}
    for name in wing:
        assert reach(name) <= wing | LOW, name
    assert [n for n in GRAPH if n not in wing and GRAPH[n] & wing] == []


def test_the_architecture_names_every_file():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    inside = [path.relative_to(PACKAGE).parts for path in FILES]
    rooms = {f"{first}/" if rest else first for first, *rest in inside}
    assert {r for r in rooms if f"`{r}`" not in page} <= {"__init__.py", "_version.py"}


def test_no_file_has_outgrown_the_house():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


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
