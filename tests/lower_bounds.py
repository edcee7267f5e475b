"""Prints pip constraints that hold each package which pyproject.toml names to the oldest release it declares.

    python tests/lower_bounds.py pyproject.toml constraints.txt

torch alone is the release of constraints.txt: on some machines the others are builds for CUDA, of several gigabytes.
"""

import re
import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def lower_bounds(pyproject: str, pinned: str) -> list[str]:
    """Return a line `name==version` for each requirement of the project and its extras that has a lower bound."""
    project = tomllib.loads(pyproject)["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    oldest = {}
    for line in [*project["dependencies"], *extras]:
        requirement = Requirement(line)
        bounds = [one.version for one in requirement.specifier if one.operator == ">="]
        if bounds:
            oldest[requirement.name] = bounds[0]
    oldest["torch"] = re.search(r"^torch==(\S+)", pinned, re.MULTILINE)[1]
    return [f"{name}=={version}" for name, version in sorted(oldest.items())]


if __name__ == "__main__":
    print("\n".join(lower_bounds(*(Path(name).read_text() for name in sys.argv[1:]))))
