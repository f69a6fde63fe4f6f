"""Measures of the source code: rooms and imports, sizes, complexity, docstrings, names, duplicated lines.

    python tools/house.py           # a table in Markdown
    python tools/house.py --json    # the same numbers, and what they come from
    python tools/house.py --root ../before    # of another checkout

- A room is a folder directly below `hf_peft_ext`; an arrow is a pair of rooms of which one imports the other.
- Cycles are counted twice: with the imports that run when a module is imported, and with all.
- A function's length leaves out its docstring. Its complexity is McCabe's, counted on the syntax tree: one more for
  each branch, loop, handler, `and`, `or`, and condition of a comprehension.
- Public names have no leading underscore. A method that overrides one of this package needs no docstring.
- A line is duplicated where it belongs to six lines of code in a row that occur twice.
"""

import argparse
import ast
import io
import json
import statistics
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT, PACKAGE = Path(__file__).parents[1], "hf_peft_ext"
ELSEWHERE = ("hub_cards", "trainers")  # rooms at the top level of the repository
WINDOW = 6  # lines in a row that count as duplicated
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.Assert, ast.match_case)
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(frozen=True)
class Definition:
    """A function or class."""

    module: str
    name: str  # dotted, inside the module
    node: ast.FunctionDef | ast.ClassDef
    parent: ast.ClassDef | None  # the class that it is in
    nested: bool  # local to a function

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def is_public(self) -> bool:
        """Whether it is not local to a function, and no part of its name has a leading underscore."""
        return not self.nested and not any(part.startswith("_") for part in self.name.split("."))

    @property
    def lines(self) -> int:
        """Lines from `def` or `class` to the end, without the docstring."""
        node, first = self.node, self.node.body[0]
        docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(node, clean=False) is not None else 0
        return node.end_lineno - node.lineno + 1 - docstring

    @property
    def complexity(self) -> int:
        """McCabe's number of independent paths, counted on the syntax tree."""
        total = 1
        for node in ast.walk(self.node):
            total += isinstance(node, BRANCHES)
            total += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
            total += 1 + len(node.ifs) if isinstance(node, ast.comprehension) else 0
        return total

    @property
    def is_typed(self) -> bool:
        """Whether each argument and the result have a type; `self`, `cls` and the result of `__init__` need none."""
        a = self.node.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        decorators = [ast.unparse(decorator) for decorator in self.node.decorator_list]
        arguments = arguments[1:] if self.parent and "staticmethod" not in decorators else arguments
        return all(arg.annotation for arg in arguments) and bool(self.node.returns or self.node.name == "__init__")


class Module:
    """A module: its text, its syntax tree, and what they define and import."""

    def __init__(self, name: str, path: Path):
        self.name, self.text = name, path.read_text(encoding="utf-8")
        self.package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        self.room = self.package.split(".")[:2][-1]
        self.tree = ast.parse(self.text)

    @cached_property
    def definitions(self) -> list[Definition]:
        """All functions and classes, also nested ones."""
        return list(self._below(self.tree, "", None, False))

    def _below(self, node: ast.AST, prefix: str, parent: ast.ClassDef | None, nested: bool) -> Iterator[Definition]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                name = prefix + child.name
                yield Definition(self.name, name, child, parent, nested)
                inside = child if isinstance(child, ast.ClassDef) else None
                yield from self._below(child, f"{name}.", inside, nested or inside is None)
            else:
                yield from self._below(child, prefix, parent, nested)

    @cached_property
    def constants(self) -> list[str]:
        """Public names that are assigned at module level."""
        targets = [target for node in self.tree.body if isinstance(node, ast.Assign) for target in node.targets]
        targets += [node.target for node in self.tree.body if isinstance(node, ast.AnnAssign)]
        names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        return [name for name in names if not name.startswith("_")]

    @cached_property
    def code_lines(self) -> dict[int, str]:
        """Number and text of the lines of code: no blank lines, comments, docstrings."""
        docstrings = set()
        for node in (self.tree, *(definition.node for definition in self.definitions)):
            if ast.get_docstring(node) is not None:
                docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        spans = [range(t.start[0], t.end[0] + 1) for t in tokens if t.type not in LAYOUT]
        numbers = {number for span in spans for number in span} - docstrings
        lines = [line.strip() for line in self.text.splitlines()]
        return {number: lines[number - 1] for number in sorted(numbers) if lines[number - 1]}

    def imports(self, node: ast.AST, everywhere: bool) -> Iterator[str]:
        """Dotted names that a node imports; inside functions and for type checkers only if `everywhere`."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                package = self.package.split(".")
                above = package[: len(package) - child.level + 1] if child.level else []
                base = ".".join([*above, *([child.module] if child.module else [])])
                yield from (f"{base}.{alias.name}" for alias in child.names)
            elif everywhere or not isinstance(child, ast.FunctionDef):
                if everywhere or not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
                    yield from self.imports(child, everywhere)


class House:
    """All modules of the package in a checkout.

    Args:
        root: the folder with `pyproject.toml`.
    """

    def __init__(self, root: Path = ROOT):
        self.root = root
        folders = {PACKAGE: root / PACKAGE} | {f"{PACKAGE}.{room}": root / room for room in ELSEWHERE}
        self.modules = {module.name: module for name in folders for module in self._read(folders[name], name)}
        self.definitions = [definition for module in self.modules.values() for definition in module.definitions]
        self.functions = [d for d in self.definitions if isinstance(d.node, ast.FunctionDef)]

    def _read(self, folder: Path, name: str) -> Iterator[Module]:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                yield from self._read(path, f"{name}.{path.name}")
            elif path.suffix == ".py":
                yield Module(name if path.stem == "__init__" else f"{name}.{path.stem}", path)

    def imports(self, everywhere: bool = False) -> dict[str, set[str]]:
        """Module -> the modules of the package that it imports."""
        edges: dict[str, set[str]] = {}
        for module in self.modules.values():
            names = set(module.imports(module.tree, everywhere))
            names |= {name.rpartition(".")[0] for name in names if name not in self.modules}
            edges[module.name] = (names & self.modules.keys()) - {module.name}
        return edges

    def arrows(self) -> set[tuple[str, str]]:
        """Pairs of rooms of which the first imports the second."""
        room = {name: module.room for name, module in self.modules.items()}
        imports = self.imports(everywhere=True)
        return {(room[a], room[b]) for a, names in imports.items() for b in names if room[a] != room[b]}

    def cycles(self, everywhere: bool = False) -> list[list[str]]:
        """Groups of modules that import each other, directly or through others."""
        edges = self.imports(everywhere)
        reached = {name: reachable(name, edges) for name in edges}
        groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in edges}
        return sorted(sorted(group) for group in groups if len(group) > 1)

    @cached_property
    def overriding(self) -> set[str]:
        """Methods that override one of a class of this package."""
        classes = [d.node for d in self.definitions if isinstance(d.node, ast.ClassDef)]
        names = {cls.name for cls in classes}
        bases = {c.name: {ast.unparse(b).split("[")[0].rpartition(".")[2] for b in c.bases} & names for c in classes}
        methods = {(d.parent.name, d.node.name): d for d in self.functions if d.parent}
        above = {name: reachable(name, bases) - {name} for name in names}
        return {str(d) for (cls, name), d in methods.items() if any((base, name) in methods for base in above[cls])}

    def public(self) -> list[Definition]:
        """Public functions, classes and methods, without methods that override one of this package."""
        return [d for d in self.definitions if d.is_public and str(d) not in self.overriding]

    def without_docstring(self) -> list[Definition]:
        """Public functions, classes and methods that have no docstring."""
        return [d for d in self.public() if ast.get_docstring(d.node) is None]

    def names_alike(self, constants: bool = False) -> dict[str, list[str]]:
        """Public name -> the modules that define it, where there are several."""
        where: dict[str, list[str]] = defaultdict(list)
        for module in self.modules.values():
            tops = [d.name for d in module.definitions if d.is_public and d.parent is None]
            for name in dict.fromkeys(module.constants if constants else tops):
                where[name].append(module.name)
        return {name: modules for name, modules in sorted(where.items()) if len(modules) > 1}

    def duplicated(self) -> int:
        """Lines of code that occur twice."""
        windows: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
        for module in self.modules.values():
            numbers, lines = list(module.code_lines), list(module.code_lines.values())
            for i in range(len(lines) - WINDOW + 1):
                if not all(line.startswith(("import ", "from ")) for line in lines[i : i + WINDOW]):
                    windows[tuple(lines[i : i + WINDOW])] += [(module.name, n) for n in numbers[i : i + WINDOW]]
        return len({place for places in windows.values() if len(places) > WINDOW for place in places})

    def measures(self) -> dict[str, float | int | str]:
        """Name of a measure -> its value."""
        lengths = [len(module.text.splitlines()) for module in self.modules.values()]
        sizes, paths = [f.lines for f in self.functions], [f.complexity for f in self.functions]
        public, code = self.public(), sum(len(module.code_lines) for module in self.modules.values())
        documented = [doc for d in public if (doc := ast.get_docstring(d.node))]
        cycles = [sum(map(len, self.cycles(everywhere))) for everywhere in (False, True)]
        tests = self.root.glob("tests/**/*.py")
        return {
            "folders": len({module.package for module in self.modules.values()}),
            "rooms": len({module.room for module in self.modules.values()}),
            "arrows between rooms": len(self.arrows()),
            "modules in import cycles": cycles[0],
            "the same, with imports in functions and for types": cycles[1],
            "modules": len(lengths),
            "lines of a module, median": int(statistics.median(lengths)),
            "lines of a module, longest": max(lengths),
            "functions": len(sizes),
            "functions over 45 lines": sum(size > 45 for size in sizes),
            "functions over 60 lines": sum(size > 60 for size in sizes),
            "lines of a function, longest": max(sizes),
            "complexity, mean": round(statistics.mean(paths), 2),
            "complexity over 10": percent(sum(path > 10 for path in paths), len(paths)),
            "public functions, classes, methods": len(public),
            "with a docstring": percent(len(documented), len(public)),
            "with Raises": percent(sum("Raises:" in doc for doc in documented), len(public)),
            "typed signatures": percent(sum(f.is_typed for f in self.functions), len(sizes)),
            "public functions and classes with a name used twice": len(self.names_alike()),
            "public constants with a name used twice": len(self.names_alike(constants=True)),
            "duplicated lines": percent(self.duplicated(), code),
            "lines of code": code,
            "lines of code of the tests": sum(len(Module(path.stem, path).code_lines) for path in tests),
        }

    def details(self) -> dict[str, object]:
        """Where the measures come from, for whoever mends them."""
        missing = Counter(d.module for d in self.without_docstring())
        return {
            "arrows": sorted(f"{a} > {b}" for a, b in self.arrows()),
            "cycles": self.cycles(everywhere=True),
            "long modules": [m.name for m in self.modules.values() if len(m.text.splitlines()) > 300],
            "long functions": {str(f): f.lines for f in self.functions if f.lines > 45},
            "complex functions": {str(f): f.complexity for f in self.functions if f.complexity > 10},
            "docstrings missing": dict(missing.most_common()),
            "without a docstring": [str(d) for d in self.without_docstring()],
            "untyped": [str(f) for f in self.functions if not f.is_typed],
            "names alike": self.names_alike(),
            "constants alike": self.names_alike(constants=True),
        }


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    """All modules that one imports, directly or through others, and itself."""
    seen, waiting = {start}, [start]
    while waiting:
        new = edges[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def percent(part: int, whole: int) -> str:
    """A share with one decimal."""
    return f"{100 * part / max(whole, 1):.1f} %"


def main() -> None:
    """Print the measures of a checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="JSON, with where the measures come from")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    arguments = parser.parse_args()
    house = House(arguments.root)
    if arguments.json:
        print(json.dumps({"measures": house.measures(), **house.details()}, indent=2))
    else:
        rows = (f"| {name} | {value} |" for name, value in house.measures().items())
        print("| measure | |\n|---|--:|", *rows, sep="\n")


if __name__ == "__main__":
    main()
