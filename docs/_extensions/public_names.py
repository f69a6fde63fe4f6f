"""The directive `public-names`: the API page of a package, made of the names that its __init__.py exports.

A name is public where `from .module import Name as Name` exports it. It is documented once, on the page of the first
package of `PACKAGES` that has it; the other pages link there. A public name without a docstring is a warning.
"""

import ast
import importlib
import inspect
import re
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

PACKAGES = (
    "hf_peft_ext",
    *(
        f"hf_peft_ext.{n}"
        for n in (
            "trainers",
            "compare",
            "intrinsic_dimension",
            "budget",
            "search",
            "export",
            "hub_cards",
            "prompts",
            "soft_prompts",
            "pruning",
            "transfer",
        )
    ),
)

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


def paragraphs(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Read docstrings as they are written: blocks indented after an empty line are literal, lists need none."""
    found: list[str] = []
    previous = ""  # the last line that is not empty
    for line in lines:
        indent, before = (len(text) - len(text.lstrip()) for text in (line, previous))
        if line.strip() and previous:
            after_empty = bool(found) and not found[-1].strip()
            if after_empty and indent > before and not previous.endswith("::"):
                found += [" " * before + "::", ""]
            elif not after_empty and line.lstrip().startswith("- ") and not previous.lstrip().startswith("- "):
                found += [""] if indent >= before else []
        found.append(line)
        previous = line if line.strip() else previous
    lines[:] = found


def valid_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Defaults such as `<factory>` become an ellipsis: Sphinx links types only where the signature is valid Python."""
    return signature and re.sub(r"<[^<>]*>", "...", signature), returns


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element) -> nodes.Element | None:
    """Link a type that a signature names by its inner module to its public page; an inner type stays plain text."""
    inner, _, name = node["reftarget"].rpartition(".")
    package = homes().get(name)
    if node.get("refdomain") != "py" or inner in PACKAGES:
        return None
    if package is None:
        is_inner = inner.startswith(f"{PACKAGES[0]}.") and hasattr(importlib.import_module(inner), name)
        return contnode if is_inner else None
    domain, target = env.get_domain("py"), f"{package}.{name}"
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("public-names", PublicNames)
    app.connect("autodoc-process-docstring", paragraphs, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", valid_signature)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
