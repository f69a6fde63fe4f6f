"""The directive `public-names`: the API page of a package, made of the names that its __init__.py exports.

A name is public where `from .module import Name as Name` exports it. It is documented once, on the page of the first
package of `PACKAGES` that has it; the other pages link there. A public name without a docstring is a warning.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

PACKAGES = ("hf_peft_ext", *(f"hf_peft_ext.{n}" for n in ("trainers", "hub_cards", "prompts", "pruning", "transfer")))

logger = logging.getLogger(__name__)


def exported(package: str) -> Iterator[tuple[str, Any]]:
    """The public names of a package with their objects, in the order of its __init__.py; modules are left out."""
    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if alias.asname == alias.name and not inspect.ismodule(value := getattr(module, alias.name)):
                yield alias.name, value


def homes() -> dict[str, str]:
    """Public name -> the package whose page documents it."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        for name, _ in exported(package):
            found.setdefault(name, package)
    return found


class PublicNames(SphinxDirective):
    """`.. public-names:: package`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        package, home = self.arguments[0], homes()
        lines, elsewhere = [], []
        for name, value in exported(package):
            if home[name] != package:
                elsewhere.append(f":py:obj:`~{home[name]}.{name}`")
                continue
            doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
            if not doc or doc.startswith(f"{name}("):  # the second is what a dataclass writes by itself
                logger.warning("%s.%s has no docstring", package, name, location=self.get_location())
            lines += [f".. auto{'class' if inspect.isclass(value) else 'function'}:: {package}.{name}"]
            lines += ["   :members:", ""] if inspect.isclass(value) else [""]
        if elsewhere:
            lines = [f"This package also exports {', '.join(elsewhere)}.", "", *lines]
        self.content = StringList(lines, source=f"<public names of {package}>")
        return self.parse_content_to_nodes(allow_section_headings=True)


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element) -> nodes.Element | None:
    """Link a type that a signature names by its inner module to its public page."""
    name = node["reftarget"].rpartition(".")[2]
    package = homes().get(name)
    if node.get("refdomain") != "py" or package is None or node["reftarget"] == f"{package}.{name}":
        return None
    domain = env.get_domain("py")
    target = f"{package}.{name}"
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("public-names", PublicNames)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
