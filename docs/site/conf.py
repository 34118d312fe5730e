"""The documentation site, made by `make docs`: Sphinx reads the Markdown pages of docs/ and those at the top."""

import re
from typing import Any

project = "Threefold"
copyright = "the authors of Threefold, MIT licence"
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md"]
exclude_patterns = [".*", "build", "runs"]
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "Threefold"
html_extra_path = ["index.html"]
html_show_sphinx = False
html_copy_source = False

SECTION = r"^## (.+?)\n(.*?)(?=^## |\Z)"
LINK = r"\]\(((?:\.\./)?\w+)\.md\)"


def add_menu(app: Any, page: str, text: list[str]) -> None:
    """Make the site's menu of the links in docs/index.md, by its headings: a page that is not there fails the build."""
    if page == root_doc:
        for title, section in re.findall(SECTION, text[0], re.MULTILINE | re.DOTALL):
            pages = "\n".join(re.findall(LINK, section))
            text[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{pages}\n```\n"


def setup(app: Any) -> None:
    """Let `add_menu` see every page before it is parsed."""
    app.connect("source-read", add_menu)
