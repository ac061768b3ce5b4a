"""How Sphinx builds the documentation: `make docs`. It needs no network, to build or to read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import rope_middleware

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

DOCS = Path(__file__).parent
PROJECT = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]

project = "rope_middleware"
author = PROJECT["authors"][0]["name"]
copyright = author  # noqa: A001 - Sphinx's name
version = release = PROJECT["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = True
# No intersphinx: its inventories come over the network. So what other packages and the standard
# library define has no page to link to, nor have the type variables and private names of our own.
nitpick_ignore_regex = [
    (r"py:.*", r"(sqlalchemy|collections|asyncio|types|typing|weakref|wsgiref|flask)\..*"),
    (r"py:.*", r"(_typeshed|rope_middleware(\.\w+)+\._\w+|_\w+)(\..*)?"),
    (r"py:.*", r"rope_middleware\.session\.\w+\.\w+"),
    (r"py:.*", r"[a-z_]+"),  # arguments, in the docstrings' single backticks
    (r"py:.*", r"(Async)?Session|(Async)?Engine|ScopedRegistry|Flask|ASGIApp|WSGIApplication"),
]
default_role = "py:obj"  # what the docstrings have in single backticks

myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"rope_middleware {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"

# What a browser fetches by itself. A link that a reader may follow is no such thing.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc\s*=\s*["'](?:https?:)?//"""
    r"""|<link\b(?![^>]*\brel=["']canonical)[^>]*\bhref\s*=\s*["'](?:https?:)?//"""
)
FETCHED_BY_CSS = re.compile(r"""(?:@import\s+["']|url\(\s*["']?)(?:https?:)?//""")


def refuse_remote_parts(app: Sphinx, exception: Exception | None) -> None:
    """Fail a build whose pages would load something from another host."""
    if exception is not None or app.builder.format != "html":
        return
    for path in sorted(Path(app.outdir).rglob("*")):
        pattern = {".html": FETCHED, ".css": FETCHED_BY_CSS}.get(path.suffix)
        found = pattern and pattern.search(path.read_text(encoding="utf-8"))
        if found:
            raise RuntimeError(f"{path} would load something from another host: {found[0]}")


def resolve_public_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> nodes.reference | None:
    """Find a public name of the package that a docstring of a submodule mentions."""
    name = node.get("reftarget")
    if node.get("refdomain") != "py" or name not in rope_middleware.__all__:
        return None
    return env.domains["py"].resolve_xref(
        env, node["refdoc"], app.builder, "obj", f"rope_middleware.{name}", node, contnode
    )


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("missing-reference", resolve_public_name)
    app.connect("build-finished", refuse_remote_parts)
