"""What the site takes from elsewhere in the repository: examples, results, two papers.

Pages link to files as they lie in the repository, so that they can be followed there too; here the
links are turned to the copies in the site.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
#: Pages made of files beside the documentation.
PAPERS = {"changes.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
LINK = re.compile(r"\]\((?:\.\./)+((?:benchmarks/results|examples|CHANGELOG|CONTRIBUTING)[^)#\s]*)")


def on_files(files, config):
    """Adds the generated pages and the pictures and figures of benchmarks."""
    for page, source in PAPERS.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = f"# {path.name}\n\n````python\n{path.read_text(encoding='utf-8')}````\n"
        files.append(File.generated(config, f"examples/{path.stem}.md", content=text))
    for path in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
        text = notebook(json.loads(path.read_text(encoding="utf-8")))
        files.append(File.generated(config, f"examples/notebooks/{path.stem}.md", content=text))
    for path in sorted((ROOT / "benchmarks" / "results").iterdir()):
        name = f"results/{path.name}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def notebook(content):
    """A notebook as a page: its text, and its cells as code."""
    cells = ((cell["cell_type"], "".join(cell["source"])) for cell in content["cells"])
    return "\n\n".join(f"```python\n{s}\n```" if kind == "code" else s for kind, s in cells) + "\n"


def on_page_markdown(markdown, page, config, files):
    """Turns links out of the documentation into links within the site."""
    up = "../" * page.file.src_uri.count("/")

    def turned(match):
        target = match[1].replace("benchmarks/results/", "results/")
        target = re.sub(r"^(examples/[\w/]+)\.(?:py|ipynb)$", r"\1.md", target)
        for name, source in PAPERS.items():
            target = name if target == source else target
        return f"]({up}{target}"

    if page.file.src_uri == "contributing.md":
        markdown = markdown.replace("](docs/", "](")
    return LINK.sub(turned, markdown)
