"""The README and every page: blocks run in order as a reader would paste them, commands exist."""

import html
import importlib.util
import re
import subprocess
import sys

import pytest
import torch
from paths import ROOT

DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
TEXTS = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in PAGES}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in TEXTS.items()}
WITH_BLOCKS = [name for name, blocks in BLOCKS.items() if blocks]
#: A recipe for one of these is left out where it is not installed; the rest of its page runs.
LOGGERS = {"torch.utils.tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
FRAMEWORKS = (
    *("lightning", "accelerate", "transformers", "torchdata", "torchvision", "matplotlib"),
    *("scipy", "tqdm"),
)


def check_readme(names, shown):
    report = names["optimizer"].last_report
    assert report.accepted
    assert report.new_loss < report.loss
    assert f"step {report.step}: loss " in shown


def check_frameworks(names, shown):
    assert shown.count(": loss ") == 2
    assert "HFTrainer" in names


def check_kronecker(names, shown):
    assert names["losses"][-1] < 0.5 * names["losses"][0]


#: What has to be true of a page's names and of what it printed, when it has run.
CHECKS = {
    "README.md": check_readme,
    "docs/index.md": check_readme,
    "docs/frameworks.md": check_frameworks,
    "docs/kronecker.md": check_kronecker,
}


def _loggers_are_installed(block):
    return all(
        importlib.util.find_spec(package)
        for module, package in LOGGERS.items()
        if re.search(rf"^(?:from|import) {module}\b", block, re.M)
    )


def test_the_pages_with_blocks_are_found():
    assert CHECKS.keys() <= set(WITH_BLOCKS)


@pytest.fixture
def _own_process_state():
    yield
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning asks isinstance
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")  # one process: no group
@pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.filterwarnings("ignore:::(wandb|mlflow|google|pydantic)")
@pytest.mark.usefixtures("_own_process_state")
@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_blocks_run_in_order(name, capsys, tmp_path, monkeypatch):
    for framework in FRAMEWORKS:
        if any(re.search(rf"^(?:from|import) {framework}\b", b, re.M) for b in BLOCKS[name]):
            pytest.importorskip(framework)
    monkeypatch.chdir(tmp_path)  # a block saves a checkpoint
    torch.manual_seed(0)
    names = {"__name__": "page"}
    monkeypatch.setenv("WANDB_SILENT", "true")
    for block in BLOCKS[name]:
        if not _loggers_are_installed(block):
            continue
        exec(compile(block, name, "exec"), names)
    if name in CHECKS:
        CHECKS[name](names, capsys.readouterr().out)


@pytest.mark.parametrize("name", TEXTS)
def test_commands_and_files_exist(name):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    typed = re.findall(r"(?:^|`)make ([a-z-]+)", TEXTS[name], re.M)
    assert set(typed) <= targets
    for path in re.findall(r"\b(?:examples|tests|benchmarks|docs)/[\w/-]+\.\w+", TEXTS[name]):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *TEXTS])
def test_links_to_files_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target and target not in ("changes.md", "contributing.md"):
            assert (page.parent / target).exists(), target


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocs_glightbox")
    pytest.importorskip("mkdocstrings_handlers.python")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        # nothing is fetched: no script, style, font or picture from another host
        assert not re.search(r"<(?:script|img)[^>]+src=\"?https?:", text), page
        assert not re.search(r"<link[^>]+rel=\"?(?:stylesheet|preconnect)[^>]+https?:", text), page
        # docstring examples are code, not quotations, and signatures wrap
        assert page.parent.name != "api" or "<blockquote>" not in text, page
        signatures = re.findall(r'doc-signature highlight"><pre>(.*?)</pre>', text, re.DOTALL)
        for line in "\n".join(signatures).splitlines():
            assert len(html.unescape(re.sub("<[^>]+>", "", line))) <= 88, line
    # the search finds its index where no server answers
    assert (tmp_path / "site" / "search" / "search_index.js").is_file()
    assert "javascripts/iframe-worker.js" in (tmp_path / "site" / "index.html").read_text()
