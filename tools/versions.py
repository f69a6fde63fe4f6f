"""Versions that were run: the exact set (constraints.txt), others (tested_versions.txt); what pyproject.toml allows.

    python tools/versions.py constraints [FILE]   # write the set that is installed here
    python tools/versions.py record [FILE]        # add the versions that are installed here to tested_versions.txt
    python tools/versions.py oldest FILE          # write the oldest set that pyproject.toml allows, but for torch
    python tools/versions.py check                # fail where pyproject.toml allows a version that was never run

A range such as `>=5.15,<5.25` is taken as run if both its ends were: some 5.15 and some 5.24.
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
    """What pyproject.toml asks for, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = (Requirement(text) for requirements in lists for text in requirements)
    return [requirement for requirement in found if canonicalize_name(requirement.name) != OURS]


def installed(requirements: list[Requirement]) -> dict[str, Distribution]:
    """What is installed of some requirements, and of theirs in turn."""
    environment = {**default_environment(), "extra": ""}
    waiting, found, seen = list(requirements), {}, set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            continue  # of an extra that is not installed here
        found[canonicalize_name(requirement.name)] = package
        for child in map(Requirement, package.requires or ()):
            extras = [environment, *({**environment, "extra": extra} for extra in requirement.extras)]
            if child.marker is None or any(map(child.marker.evaluate, extras)):
                waiting.append(child)
    return found


def pin(name: str, package: Distribution) -> str:
    """A line for pip: without a local version ("+cpu"), and for those Pythons alone that the package has."""
    allowed = SpecifierSet(package.metadata.get("Requires-Python") or "")
    oldest = next((python for python in PYTHONS if allowed.contains(f"{python}.99")), PYTHONS[0])
    marker = "" if oldest == PYTHONS[0] else f' ; python_version >= "{oldest}"'
    return f"{name}=={Version(package.version).public}{marker}"


def tested() -> dict[str, list[Version]]:
    """Name -> versions that the tests were run with."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = (line.partition(";")[0].split("==") for line in lines if not line.startswith("#"))
    found = {name: [Version(version)] for name, version in pins}
    for name, versions in recorded().items():
        found.setdefault(name, []).extend(map(Version, versions))
    return found


def recorded() -> dict[str, list[str]]:
    lines = (line.split() for line in TESTED.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    return {name: versions for name, *versions in filter(None, lines)}


def never_run(requirement: Requirement, versions: list[Version]) -> Iterator[str]:
    """How a requirement allows versions older than the oldest, or newer than the newest, that was run."""
    ends = {spec.operator: Version(spec.version).release for spec in requirement.specifier}
    low, high = ends.get(">="), ends.get("<")
    if low is None or not any(version.release[: len(low)] == low for version in versions):
        yield f"{requirement}: no version at its lower end was run"
    below = None if high is None else (*high[:-1], high[-1] - 1)
    if below is None or not any(version.release[: len(below)] == below for version in versions):
        yield f"{requirement}: no version at its upper end was run"


def check() -> list[str]:
    """What pyproject.toml allows and nobody ran."""
    known, excused = tested(), {name for name, versions in recorded().items() if not versions}
    return [
        said
        for requirement in direct()
        if (name := canonicalize_name(requirement.name)) not in excused
        for said in never_run(requirement, known.get(name, []))
    ]


def record(file: Path) -> None:
    head = [line for line in TESTED.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    known, here = recorded(), installed(direct())
    for name in {canonicalize_name(requirement.name) for requirement in direct()} & here.keys():
        if known.get(name) == []:
            continue  # excused
        versions = {*known.get(name, []), Version(here[name].version).public}
        known[name] = [str(version) for version in sorted(map(Version, versions))]
    lines = [" ".join([name, *versions]) for name, versions in sorted(known.items())]
    file.write_text("\n".join([*head, *lines, ""]), encoding="utf-8")


def constraints(file: Path) -> None:
    head = "# The exact set that `make test` was run with, on Linux and Python {}.{}; renewed by `make constraints`."
    lines = [pin(name, package) for name, package in sorted(installed(direct()).items())]
    file.write_text("\n".join([head.format(*sys.version_info), *lines, ""]), encoding="utf-8")


def oldest(file: Path) -> None:
    lows = {
        requirement.name: spec.version
        for requirement in direct()
        for spec in requirement.specifier
        if spec.operator == ">=" and requirement.name != "torch"  # which machines have of their own
        if recorded().get(canonicalize_name(requirement.name)) != []
    }
    file.write_text("".join(f"{name}=={low}\n" for name, low in lows.items()), encoding="utf-8")


def main(command: str, *files: str) -> int:
    if command == "check":
        said = check()
        print("\n".join(said) or "pyproject.toml allows nothing that was not run.")
        return len(said) > 0
    writers = {"constraints": (constraints, CONSTRAINTS), "record": (record, TESTED), "oldest": (oldest, "oldest.txt")}
    write, default = writers[command]
    write(Path(files[0] if files else default))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
