"""The flags of the services as JSON Schema, and which of them the chart sets itself.

So a flag that a service does not have, or a value that it would refuse, is refused before anything is installed.
"""

from typing import Any

from sps2_decode_worker.__main__ import DecodeWorkerConfig
from sps2_kv_directory.config import DirectoryConfig
from sps2_prefill_worker.__main__ import PrefillWorkerConfig
from sps2_router.config import RouterConfig
from sps2_service.config import ServiceConfig
from sps2_service.config_fields import Field, fields_of

CONFIGS: dict[str, type[ServiceConfig]] = {
    "directory": DirectoryConfig,
    "router": RouterConfig,
    "prefill": PrefillWorkerConfig,
    "decode": DecodeWorkerConfig,
}
"""What each component of the chart is configured by."""

OWNED = frozenset(
    {
        "advertise", "model-hash",
        "listen", "announce-fd", "parent-pid", "drain-s", "grace-s", "model", "model-name", "directory", "profile",
        "tls-cert", "tls-key", "tls-ca", "tls-server-name", "health-port", "metrics-port", "auth-tokens", "tenants",
        "otlp-endpoint", "trace-sample-ratio",
        "redis", "redis-password-file", "namespace", "group", "rank", "group-size", "leader", "device",
    }
)  # fmt: skip
"""Flags that templates set, or that mean nothing in a container."""

_TYPES = {int: "integer", float: "number", bool: "boolean"}


def flags_schema(config: type[ServiceConfig]) -> dict[str, Any]:
    """Schema of a component's `flags`: strict, with the service's own types, bounds and choices."""
    fields = [field for field in fields_of(config) if not field.bounds.secret]
    properties = {
        field.flag.removeprefix("--"): _field_schema(field)
        for field in fields
        if field.flag.removeprefix("--") not in OWNED
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _field_schema(field: Field) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": field.help}
    if field.choices:
        return schema | {"enum": list(field.choices)}
    schema["type"] = _TYPES.get(field.kind, "string")
    bounds = {"minimum": field.bounds.minimum, "maximum": field.bounds.maximum}
    return schema | {key: bound for key, bound in bounds.items() if bound is not None}
