"""How Sphinx builds the documentation: `make docs`. It needs no network, to build or to read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, get_origin

from docutils import nodes

import rope_middleware

if TYPE_CHECKING:
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

DOCS = Path(__file__).parent
PROJECT = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]

project = "rope_middleware"
author = PROJECT["authors"][0]["name"]
copyright = author  # noqa: A001 - Sphinx's name
version = release = PROJECT["version"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True
# Arguments, in the docstrings' single backticks; type variables and private names of our own.
nitpick_ignore_regex = [
    (r"py:.*", r"[a-z_]+"),
    (r"py:.*", r"(_typeshed|rope_middleware(\.\w+)+\._\w+|_\w+)(\..*)?"),
    (r"py:.*", r"sqlalchemy(\.\w+)+\._\w+"),
    (r"py:.*", r"rope_middleware\.session(\.\w+)+"),
    (r"py:.*", r"ASGIApp|WSGIApplication"),
]
# No network: of what other projects define, the names that are used here stand in a text file each,
# in the first of Sphinx's formats (name, kind, page). A name that is missing is a warning.
intersphinx_mapping = {
    "sqlalchemy": ("https://docs.sqlalchemy.org/en/20/", "_inventories/sqlalchemy.inv"),
    "python": ("https://docs.python.org/3/", "_inventories/python.inv"),
    "flask": ("https://flask.palletsprojects.com/en/stable/", "_inventories/flask.inv"),
}
# Where a name is documented that is defined, or called, otherwise.
DOCUMENTED_AS = {
    "AsyncEngine": "sqlalchemy.ext.asyncio.AsyncEngine",
    "AsyncSession": "sqlalchemy.ext.asyncio.AsyncSession",
    "Engine": "sqlalchemy.engine.Engine",
    "Flask": "flask.Flask",
    "flask.app.Flask": "flask.Flask",
    "ScopedRegistry": "sqlalchemy.util.ScopedRegistry",
    "Session": "sqlalchemy.orm.Session",
    "async_scoped_session": "sqlalchemy.ext.asyncio.async_scoped_session",
    "async_sessionmaker": "sqlalchemy.ext.asyncio.async_sessionmaker",
    "scoped_session": "sqlalchemy.orm.scoped_session",
    "sessionmaker": "sqlalchemy.orm.sessionmaker",
    "sqlalchemy.ext.asyncio.scoping.async_scoped_session": (
        "sqlalchemy.ext.asyncio.async_scoped_session"
    ),
    "sqlalchemy.ext.asyncio.session.async_sessionmaker": (
        "sqlalchemy.ext.asyncio.async_sessionmaker"
    ),
    "sqlalchemy.orm.scoping.scoped_session": "sqlalchemy.orm.scoped_session",
    "stream_with_context": "flask.stream_with_context",
}
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
html_js_files = ["pages.js"]
html_copy_source = False
html_show_sphinx = False
# What is copied is what can be pasted: neither a prompt nor what the command prints.
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
copybutton_line_continuation_character = "\\"
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
    """Find a public name of the package that a docstring of a submodule mentions.

    Of a name of another project it is only told what intersphinx, which comes next, shall look for.
    """
    name = node.get("reftarget")
    if node.get("refdomain") != "py" or name not in rope_middleware.__all__:
        node["reftarget"] = DOCUMENTED_AS.get(name, name)
        return None
    return env.domains["py"].resolve_xref(
        env, node["refdoc"], app.builder, "obj", f"rope_middleware.{name}", node, contnode
    )


# What a reader knows a type variable as.
READABLE = {"_S": "Session", "_AS": "AsyncSession", "_T": "Session"}


def name_types(_app: Sphinx, doctree: nodes.document) -> None:
    """Show the types that type variables stand for: `Session`, and not `_S`."""
    for text in list(doctree.findall(nodes.Text)):
        parent = text.parent
        if str(text) in READABLE and not isinstance(parent, nodes.literal_block):
            parent.replace(text, nodes.Text(READABLE[str(text)]))


def drop_generic(*event: Any) -> None:
    """Leave out the base class that is for type checkers alone."""
    bases = event[-1]
    bases[:] = [base for base in bases if get_origin(base) is not Generic]


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("doctree-read", name_types)
    app.connect("autodoc-process-bases", drop_generic)
    app.connect("missing-reference", resolve_public_name, priority=400)
    app.connect("build-finished", refuse_remote_parts)
