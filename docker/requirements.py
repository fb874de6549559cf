"""Print what a pyproject.toml and some of its extras require, one per line: `requirements.py FILE EXTRA...`."""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """The sorted requirements, the build system's among them. An extra may name others of the same project
    (`captune[trainer]`). Raises KeyError for an extra that is not there."""
    data = tomllib.loads(pyproject.read_text("utf-8"))
    project = data["project"]
    own = project["name"] + "["
    found = set(data["build-system"]["requires"]) | set(project.get("dependencies", []))
    pending = list(extras)
    while pending:
        for line in project["optional-dependencies"][pending.pop()]:
            if line.startswith(own):
                pending += line[len(own) : line.index("]")].split(",")
            else:
                found.add(line)
    return sorted(found)


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]), sys.argv[2:])))
