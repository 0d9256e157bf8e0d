"""constraints.txt pins what `.venv` contains, and nothing else."""

from __future__ import annotations

import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="needs the environment of make setup")


def pins() -> dict[str, str]:
    """Returns the pinned version of each distribution."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in requirements}


def required(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> set[str]:
    """Returns everything that a distribution needs on this machine, except what another one pins exactly."""
    if (name, extras) in seen:
        return set()
    seen.add((name, extras))
    found = set()
    for requirement in map(Requirement, distribution(name).requires or []):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras | {""}):
            dependency = canonicalize_name(requirement.name)
            if not str(requirement.specifier).startswith("=="):
                found.add(dependency)
            found |= required(dependency, frozenset(requirement.extras), seen)
    return found


def test_every_pin_is_what_is_installed() -> None:
    installed = {name: distribution(name).version.partition("+")[0] for name in pins()}
    assert installed == pins()


def test_everything_that_is_required_is_pinned() -> None:
    assert required("mpt-grpc", frozenset({"dev"}), set()) - {"mpt-grpc"} - set(pins()) == set()
