"""A pod's volumes on the node, and where its containers see them."""

import base64
from collections.abc import Mapping
from pathlib import Path

from support.kubelet.commands import run
from support.kubelet.environment import ManifestError, Object

BYTES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def num_bytes(quantity: str) -> int:
    """A quantity of Kubernetes with a binary unit, or none."""
    unit = BYTES.get(quantity[-2:])
    return int(quantity) if unit is None else int(quantity[:-2]) * unit


async def make_volumes(
    pod: Object, folder: Path, secrets: Mapping[str, Object], config_maps: Mapping[str, Object]
) -> dict[str, Path]:
    """Makes the volumes of a pod below `folder`; their paths on the node by name.

    Raises:
        ManifestError: a volume of a kind that is not known here, or of an object that does not exist.
    """
    paths = {}
    for volume in pod["spec"].get("volumes", []):
        path = paths[volume["name"]] = folder / "volumes" / volume["name"]
        path.mkdir(parents=True)
        match volume:
            case {"emptyDir": {"medium": "Memory", "sizeLimit": limit}}:
                await run("mount", "-t", "tmpfs", "-o", f"size={num_bytes(limit)}", "tmpfs", str(path))
            case {"emptyDir": _}:
                pass  # the limit of one on disk is watched by the kubelet from time to time; here it is not
            case {"secret": {"secretName": name}} if name in secrets:
                _fill(path, {key: base64.b64decode(text) for key, text in secrets[name]["data"].items()})
            case {"configMap": {"name": name}} if name in config_maps:
                _fill(path, {key: text.encode() for key, text in config_maps[name]["data"].items()})
            case _:
                raise ManifestError(f"volume {volume}: not known here, or of an object that does not exist")
    return paths


async def remove_volumes(pod: Object, folder: Path) -> None:
    """Gives the memory of memory volumes back."""
    for volume in pod["spec"].get("volumes", []):
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            await run("umount", str(folder / "volumes" / volume["name"]))


def mounts(container: Object, paths: Mapping[str, Path]) -> list[str]:
    """Arguments of bwrap that put the volumes where the container mounts them."""
    arguments: list[str] = []
    for mount in container.get("volumeMounts", []):
        option = "--ro-bind" if mount.get("readOnly") else "--bind"
        arguments += [option, str(paths[mount["name"]]), mount["mountPath"]]
    return arguments


def _fill(path: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (path / name).write_bytes(data)
