"""What the images would hold: environment, user and folder by their Dockerfiles, files from this checkout.

The virtual environment of the tests stands in for the image's, whose Python finds the checkout's packages instead of
the installed wheel; Debian is this machine's, read-only. Scripts of the environment begin with its path in the image.
"""

import re
import shutil
import sys
import sysconfig
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from scripts.check_images import Stage, parse
from support.kubelet.namespaces import ROOT
from support.redis_server import find_redis_server

VENV = "/opt/sps2"
SOURCES = f"{VENV}/src"
BASE_PATH = "/usr/local/bin:/usr/bin:/bin"
SYSTEM = ("/usr", "/etc/alternatives", "/etc/ld.so.cache")
DOCKERFILES = {"control": ("control", "control"), "cpu": ("worker", "cpu"), "cuda": ("worker", "cuda")}
"""File and stage by the key in the chart's `images`."""


@dataclass(frozen=True)
class Image:
    """An image as bwrap can have it."""

    env: dict[str, str]
    folder: str
    """Where processes start."""
    files: tuple[str, ...]
    """Arguments of bwrap that make its root."""


def make_images(values: dict[str, Any], folder: Path) -> dict[str, Image]:
    """The images that these values of the chart name, by repository; `folder` gets what has to be written for them."""
    folder.mkdir()
    system = _system(folder)
    venv = _venv(folder)
    images = {
        values["images"][key]["repository"]: _image(file, stage, (*system, *venv))
        for key, (file, stage) in DOCKERFILES.items()
    }
    redis = ("--ro-bind", str(find_redis_server()), "/opt/redis/redis-server")
    images[values["images"]["redis"]["repository"]] = Image(
        {"PATH": f"/opt/redis:{BASE_PATH}"}, "/", (*system, *redis)
    )
    return images


def _image(file: str, name: str, files: tuple[str, ...]) -> Image:
    _, stages = parse((ROOT / "docker" / f"{file}.Dockerfile").read_text(encoding="utf-8"))
    lineage = _lineage(name, stages)
    env = {"PATH": BASE_PATH}
    for stage in lineage:
        for one in stage.instructions:
            if one.word == "ENV":
                pairs = (word.split("=", 1) for word in one.rest.split())
                env |= {key: value.replace("$PATH", env["PATH"]) for key, value in pairs}
    copied = [
        argument
        for stage in lineage
        for one in stage.instructions
        if one.word == "COPY" and not one.rest.startswith("--from=")
        for source, target in [one.rest.split()]
        for argument in ("--ro-bind", str(ROOT / source), target)
    ]
    folder = [stage.last("WORKDIR") for stage in lineage if stage.last("WORKDIR")][-1]
    return Image(env, folder, (*files, *copied))


def _lineage(name: str, stages: list[Stage]) -> list[Stage]:
    """The stage and those that it is made from, the first one first."""
    found = [stage for stage in stages if stage.name == name]
    return [*(_lineage(found[0].base, stages)), *found] if found else []


def _system(folder: Path) -> tuple[str, ...]:
    """Debian without users of ours: whoever asks for the name of 10001 finds none, as in the image."""
    (folder / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n", encoding="utf-8")
    (folder / "group").write_text("root:x:0:\n", encoding="utf-8")
    arguments = [*("--ro-bind", str(folder / "passwd"), "/etc/passwd")]
    arguments += ["--ro-bind", str(folder / "group"), "/etc/group"]
    for path in SYSTEM:
        arguments += ["--ro-bind-try", path, path]
    for link in ("bin", "sbin", "lib", "lib64"):
        arguments += ["--symlink", f"usr/{link}", f"/{link}"]
    return tuple(arguments)


def _venv(folder: Path) -> tuple[str, ...]:
    """The environment of this Python at its place in the image, with this checkout's packages."""
    programs = folder / "bin"
    programs.mkdir()
    interpreter = Path(sys.executable).resolve()
    for name in ("python", "python3"):
        (programs / name).symlink_to(interpreter)
    for name in ("sps2", "hf"):
        _install(Path(sys.prefix, "bin", name), programs / name)
    rooms = _rooms()
    paths = folder / "sources.pth"
    paths.write_text("".join(f"{SOURCES}/{room}\n" for room in rooms), encoding="utf-8")
    purelib = Path(sysconfig.get_path("purelib"))
    arguments = ["--ro-bind", sys.base_prefix, sys.base_prefix]
    arguments += ["--ro-bind", str(programs), f"{VENV}/bin"]
    arguments += ["--ro-bind", str(Path(sys.prefix, "lib")), f"{VENV}/lib"]
    arguments += ["--ro-bind", str(Path(sys.prefix, "pyvenv.cfg")), f"{VENV}/pyvenv.cfg"]
    for path in _path_files():
        arguments += ["--ro-bind", str(paths), f"{VENV}/{(purelib / path).relative_to(sys.prefix)}"]
    for room in rooms:
        arguments += ["--ro-bind", str(ROOT / room), f"{SOURCES}/{room}"]
    return tuple(arguments)


def _path_files() -> list[str]:
    """Where the editable install names the sources: to be replaced, they are another's."""
    files = metadata.files("sps2") or []
    return [str(file) for file in files if file.suffix == ".pth"]


def _rooms() -> list[str]:
    """The source roots of the project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    rooms: list[str] = project["tool"]["hatch"]["build"]["dev-mode-dirs"]
    return rooms


def _install(script: Path, target: Path) -> None:
    """As pip would have written it in the image."""
    text = script.read_text(encoding="utf-8")
    target.write_text(re.sub(r"\A#!.*", f"#!{VENV}/bin/python", text), encoding="utf-8")
    shutil.copymode(script, target)
