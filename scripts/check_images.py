"""Checks docker/*.Dockerfile without a Docker engine: what is copied exists, everything is pinned, commands resolve.

It reads the instructions that these files use, not all that Docker knows; what it cannot read is a problem too.
"""

import argparse
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINNED_IMAGE = re.compile(r"(:[\w.-]*\d+\.\d+\.\d+[\w.-]*|@sha256:[0-9a-f]{64})$")
KNOWN = {"ARG", "FROM", "ENV", "RUN", "COPY", "WORKDIR", "USER", "ENTRYPOINT", "CMD"}


@dataclass(frozen=True)
class Instruction:
    """One instruction, continuation lines joined."""

    word: str
    rest: str


@dataclass
class Stage:
    """What follows a FROM."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def last(self, word: str) -> str:
        """The rest of the last such instruction; empty without one."""
        return next((one.rest for one in reversed(self.instructions) if one.word == word), "")


def parse(text: str) -> tuple[dict[str, str], list[Stage]]:
    """Global arguments and stages of a Dockerfile.

    Raises:
        ValueError: an instruction that this script does not know.
    """
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for one in _instructions(text):
        if one.word not in KNOWN:
            raise ValueError(f"{one.word}: not an instruction that is used here")
        if one.word == "FROM":
            base, _, name = one.rest.partition(" AS ")
            stages.append(Stage(name.strip() or str(len(stages)), base.strip()))
        elif not stages:
            name, _, value = one.rest.partition("=")
            arguments[name] = value
        else:
            stages[-1].instructions.append(one)
    return arguments, stages


def _instructions(text: str) -> Iterator[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield Instruction(word.upper(), " ".join(rest.split()))


def problems(text: str) -> list[str]:
    """What is wrong with a Dockerfile, a sentence each."""
    try:
        arguments, stages = parse(text)
    except ValueError as error:
        return [str(error)]
    names = [stage.name for stage in stages]
    found: list[str] = []
    for index, stage in enumerate(stages):
        base = re.sub(r"\$\{(\w+)\}", lambda match: arguments.get(match[1], ""), stage.base)
        lineage = _lineage(stage, stages[:index])
        if base not in names[:index] and not PINNED_IMAGE.search(base):
            found.append(f"FROM {stage.base}: not pinned to a full version or digest")
        for one in stage.instructions:
            found += _problems_of(one, names[:index], lineage)
        if not any(later.base == stage.name for later in stages) and not _copied_from(stage.name, stages):
            found += _problems_of_an_image(stage, lineage)
    return found


def _lineage(stage: Stage, earlier: list[Stage]) -> str:
    """All that a stage and the stages it is made from say."""
    own = "\n".join(f"{one.word} {one.rest}" for one in stage.instructions)
    bases = [_lineage(one, earlier) for one in earlier if one.name == stage.base]
    return "\n".join([*bases, own])


def _problems_of(one: Instruction, stages: list[str], lineage: str) -> Iterator[str]:
    if one.word == "COPY":
        yield from _problems_of_a_copy(one, stages)
    if one.word in {"ENV", "ARG"} and re.search(r"PASSWORD|SECRET|TOKEN", one.rest):
        yield f"{one.word} {one.rest}: a secret in an image"
    for command in re.split(r"&&|;|\|", one.rest) if one.word == "RUN" else []:
        words = shlex.split(command)
        if words[:2] == ["pip", "install"]:
            yield from (
                f"RUN {command.strip()}: {problem}" for problem in _problems_of_pip(words[2:], lineage)
            )
        if words[:2] == ["apt-get", "install"] and "snapshot.debian.org" not in lineage:
            yield f"RUN {command.strip()}: apt without a snapshot installs what is new that day"


def _problems_of_pip(words: list[str], lineage: str) -> Iterator[str]:
    for setting in ("PIP_CONSTRAINT", "PIP_ONLY_BINARY=:all:"):
        if setting not in lineage:
            yield f"no {setting}"
    for name in words:
        if not name.startswith(("-", ".", "http")) and "==" not in name and _normal(name) not in _pinned():
            yield f"{name} has no version"


def _problems_of_a_copy(one: Instruction, stages: list[str]) -> Iterator[str]:
    words = one.rest.split()
    if words[0].startswith("--from="):
        if words[0].removeprefix("--from=") not in stages:
            yield f"COPY {one.rest}: no such stage"
        return
    allowed = _context()
    for source in words[:-1]:
        if not (ROOT / source).exists():
            yield f"COPY {one.rest}: {source} does not exist"
        elif source != "." and not any(source == one or source.startswith(f"{one}/") for one in allowed):
            yield f"COPY {one.rest}: {source} is not in the build context (.dockerignore)"


def _copied_from(name: str, stages: list[Stage]) -> bool:
    return any(one.rest.startswith(f"--from={name} ") for stage in stages for one in stage.instructions)


def _problems_of_an_image(stage: Stage, lineage: str) -> Iterator[str]:
    if re.search(r"^RUN .*\bpip install|^COPY \. ", lineage, re.MULTILINE):
        yield f"stage {stage.name}: is built where it runs; copy what was built from a stage before it"
    # The root is read-only: bytecode cannot be written, and a file without a path goes where it can.
    if "PYTHONDONTWRITEBYTECODE=1" not in lineage:
        yield f"stage {stage.name}: no PYTHONDONTWRITEBYTECODE=1"
    if re.findall(r"^WORKDIR (.*)$", lineage, re.MULTILINE)[-1:] != ["/tmp"]:  # noqa: S108 - a container's own
        yield f"stage {stage.name}: WORKDIR must be /tmp, the only folder that can be written"
    user = stage.last("USER")
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", user):
        yield f"stage {stage.name}: USER {user or 'is missing'}: must be a number other than 0"
    if stage.last("ENTRYPOINT") != '["python", "-m"]':
        yield f"stage {stage.name}: ENTRYPOINT must be python -m, so that the service is process 1"
    module = json.loads(stage.last("CMD") or "[null]")[0]
    if not _is_service(module):
        yield f"stage {stage.name}: CMD {module}: no such service"


def _is_service(module: str | None) -> bool:
    """Whether `python -m` can run the module; the package is looked for first, for a submodule's would be imported."""
    if module is None or importlib.util.find_spec(module) is None:
        return False
    return importlib.util.find_spec(f"{module}.__main__") is not None


def _pinned() -> set[str]:
    """The distributions that constraints.txt has a version of."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {_normal(line.partition("==")[0]) for line in lines if "==" in line and not line.startswith("#")}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _context() -> list[str]:
    """The paths that .dockerignore lets in."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


def context_problems() -> list[str]:
    """Whether the build context is the wheel's sources, neither less nor what does not exist."""
    allowed = _context()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    absent = [path for path in allowed if not (ROOT / path).exists()]
    left_out = [one for one in packages if not any(one.startswith(f"{path}/") for path in allowed)]
    return [f".dockerignore: {path} does not exist" for path in absent] + [
        f".dockerignore: {path} is part of the wheel and not let in" for path in left_out
    ]


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: all in order; 1: problems, one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    ours = sorted((ROOT / "docker").glob("*.Dockerfile"))
    parser.add_argument("files", nargs="*", type=Path, default=ours, help="Dockerfiles (default: docker/)")
    found = context_problems()
    for path in parser.parse_args(argv).files:
        found += [f"{path.name}: {one}" for one in problems(path.read_text(encoding="utf-8"))]
    print(*found or ["images: all in order"], sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
