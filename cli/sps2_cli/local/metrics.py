"""Where the processes of a local deployment serve their metrics. Pure: it binds nothing."""

from dataclasses import replace

from sps2_cli.local.plan import ProcessSpec

HOST = "127.0.0.1"


class MetricsPorts:
    """Ports by name of process, in the order in which the processes first came; one that comes again has its own."""

    def __init__(self, base: int | None) -> None:
        """`base` is the first port; None: no process serves metrics."""
        self._base = base
        self._ports: dict[str, int] = {}

    def given(self, spec: ProcessSpec) -> ProcessSpec:
        """The same process, told where to serve its metrics; Redis has none."""
        if self._base is None or spec.kind == "redis":
            return spec
        port = self._ports.setdefault(spec.name, self._base + len(self._ports))
        return replace(spec, metrics=f"{HOST}:{port}")
