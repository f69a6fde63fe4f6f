"""Manages the tested versions of dependencies, and checks pyproject.toml against them.

constraints.txt has the exact set of one environment, tested_versions.txt further versions.

    python tools/versions.py constraints [FILE]   # write the installed set
    python tools/versions.py record [FILE]        # add the installed versions to tested_versions.txt
    python tools/versions.py oldest FILE          # write the oldest set that pyproject.toml allows, without torch
    python tools/versions.py check                # fail if pyproject.toml allows an untested version

A range such as `>=5.15,<5.25` counts as tested if both its ends are: some 5.15 and some 5.24.
"""

import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import tomllib
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CONSTRAINTS, TESTED = ROOT / "constraints.txt", ROOT / "tools" / "tested_versions.txt"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
OURS = "hf-peft-ext"


def direct() -> list[Requirement]:
    """The requirements of pyproject.toml, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    everything = (Requirement(text) for requirements in lists for text in requirements)
    return [requirement for requirement in everything if canonicalize_name(requirement.name) != OURS]


def installed(requirements: list[Requirement]) -> dict[str, Distribution]:
    """The installed packages of some requirements and of their dependencies."""
    environment = {**default_environment(), "extra": ""}
    waiting, packages, seen = list(requirements), {}, set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            continue  # its extra is not installed
        packages[canonicalize_name(requirement.name)] = package
        for child in map(Requirement, package.requires or ()):
            extras = [environment, *({**environment, "extra": extra} for extra in requirement.extras)]
            if child.marker is None or any(map(child.marker.evaluate, extras)):
                waiting.append(child)
    return packages


def pin(name: str, package: Distribution) -> str:
    """A line for pip, without a local version ("+cpu"), and limited to the Python versions of the package."""
    allowed = SpecifierSet(package.metadata.get("Requires-Python") or "")
    oldest = next((python for python in PYTHONS if allowed.contains(f"{python}.99")), PYTHONS[0])
    marker = "" if oldest == PYTHONS[0] else f' ; python_version >= "{oldest}"'
    return f"{name}=={Version(package.version).public}{marker}"


def tested() -> dict[str, list[Version]]:
    """Name -> tested versions."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = (line.partition(";")[0].split("==") for line in lines if not line.startswith("#"))
    versions = {name: [Version(version)] for name, version in pins}
    for name, others in recorded().items():
        versions.setdefault(name, []).extend(map(Version, others))
    return versions


def recorded() -> dict[str, list[str]]:
    """The versions in tested_versions.txt; a name without a version is excused."""
    lines = (line.split() for line in TESTED.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    return {name: versions for name, *versions in filter(None, lines)}


def untested(requirement: Requirement, versions: list[Version]) -> Iterator[str]:
    """The ends of a requirement's range that no tested version reaches."""
    ends = {spec.operator: Version(spec.version).release for spec in requirement.specifier}
    low, high = ends.get(">="), ends.get("<")
    if low is None or not any(version.release[: len(low)] == low for version in versions):
        yield f"{requirement}: no version at its lower end was tested"
    below = None if high is None else (*high[:-1], high[-1] - 1)
    if below is None or not any(version.release[: len(below)] == below for version in versions):
        yield f"{requirement}: no version at its upper end was tested"


def check() -> list[str]:
    """The untested ends of all ranges in pyproject.toml."""
    versions, excused = tested(), {name for name, versions in recorded().items() if not versions}
    return [
        problem
        for requirement in direct()
        if (name := canonicalize_name(requirement.name)) not in excused
        for problem in untested(requirement, versions.get(name, []))
    ]


def record(file: Path) -> None:
    """Add the installed versions of the direct requirements to those of tested_versions.txt."""
    head = [line for line in TESTED.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    versions_of, packages = recorded(), installed(direct())
    for name in {canonicalize_name(requirement.name) for requirement in direct()} & packages.keys():
        if versions_of.get(name) == []:
            continue  # excused
        versions = {*versions_of.get(name, []), Version(packages[name].version).public}
        versions_of[name] = [str(version) for version in sorted(map(Version, versions))]
    lines = [" ".join([name, *versions]) for name, versions in sorted(versions_of.items())]
    file.write_text("\n".join([*head, *lines, ""]), encoding="utf-8")


def constraints(file: Path) -> None:
    """Write the installed set."""
    head = "# The exact set that `make test` was run with, on Linux and Python {}.{}; renewed by `make constraints`."
    lines = [pin(name, package) for name, package in sorted(installed(direct()).items())]
    file.write_text("\n".join([head.format(*sys.version_info), *lines, ""]), encoding="utf-8")


def oldest(file: Path) -> None:
    """Write the lower end of each range in pyproject.toml."""
    lows = {
        requirement.name: spec.version
        for requirement in direct()
        for spec in requirement.specifier
        if spec.operator == ">=" and requirement.name != "torch"  # the machine's own is used
        if recorded().get(canonicalize_name(requirement.name)) != []
    }
    file.write_text("".join(f"{name}=={low}\n" for name, low in lows.items()), encoding="utf-8")


def main(command: str, *files: str) -> int:
    """Run a command; returns its exit status."""
    if command == "check":
        problems = check()
        print("\n".join(problems) or "Both ends of every range in pyproject.toml were tested.")
        return len(problems) > 0
    writers = {"constraints": (constraints, CONSTRAINTS), "record": (record, TESTED), "oldest": (oldest, "oldest.txt")}
    write, default = writers[command]
    write(Path(files[0] if files else default))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
