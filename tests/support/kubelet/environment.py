"""A container's environment, command and arguments, as the kubelet makes them of the manifest."""

import base64
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

Object: TypeAlias = dict[str, Any]
REFERENCE = re.compile(r"\$(?:(\$)|\(([^()]+)\))")


class ManifestError(ValueError):
    """The manifest names what there is not, or has what this kubelet does not know."""


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` by its value; `$$` is a dollar; names that are not known stay as they are."""
    return REFERENCE.sub(lambda match: "$" if match[1] else variables.get(match[2], match[0]), text)


def pod_fields(pod: Object, ip: str) -> dict[str, str]:
    """What a fieldRef may name, by its path."""
    metadata = pod["metadata"]
    fields = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "status.podIP": ip,
    }
    for kind in ("labels", "annotations"):
        fields |= {f"metadata.{kind}['{key}']": value for key, value in metadata.get(kind, {}).items()}
    return fields


def environment(
    container: Object, fields: Mapping[str, str], secrets: Mapping[str, Object], base: Mapping[str, str]
) -> dict[str, str]:
    """The variables of a container's first process.

    Args:
        container: Of the manifest.
        fields: Of its pod, see `pod_fields`.
        secrets: Secrets of the namespace by name.
        base: Those of the image.

    Raises:
        ManifestError: a reference leads nowhere.
    """
    if "envFrom" in container:
        raise ManifestError("envFrom: not known here")
    declared: dict[str, str] = {}
    for entry in container.get("env", []):
        source = entry.get("valueFrom")
        value = _from(source, fields, secrets) if source else expand(entry.get("value", ""), declared)
        declared[entry["name"]] = value
    return {**base, "HOSTNAME": fields["metadata.name"], **declared}


def _from(source: Object, fields: Mapping[str, str], secrets: Mapping[str, Object]) -> str:
    match source:
        case {"fieldRef": {"fieldPath": path}} if path in fields:
            return fields[path]
        case {"secretKeyRef": {"name": name, "key": key}} if key in secrets.get(name, {}).get("data", {}):
            return base64.b64decode(secrets[name]["data"][key]).decode()
    raise ManifestError(f"valueFrom: nothing is found by {source}")


def command_line(container: Object, variables: Mapping[str, str]) -> list[str]:
    """Command and arguments, references in both replaced."""
    return [expand(word, variables) for word in [*container["command"], *container.get("args", [])]]
