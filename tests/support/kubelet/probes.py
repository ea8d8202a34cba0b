"""Probes as a manifest declares them: what is asked, how often, and when the answers make a verdict."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.kubelet.environment import ManifestError, Object


@dataclass
class Verdict:
    """Counts answers in a row; says what they amount to once there are enough of a kind."""

    successes: int
    failures: int
    value: bool | None = None
    """None: nothing yet."""
    _last: bool | None = None
    _in_a_row: int = field(default=0)

    def note(self, answer: bool) -> None:
        """Takes one answer."""
        self._in_a_row = self._in_a_row + 1 if answer is self._last else 1
        self._last = answer
        if self._in_a_row >= (self.successes if answer else self.failures):
            self.value = answer


async def verdicts(probe: Object, ip: str, ports: Mapping[str, int]) -> AsyncGenerator[bool, None]:
    """Asks a pod for ever, with the probe's period and limits; its verdict after each answer, once there is one."""
    verdict = Verdict(probe.get("successThreshold", 1), probe.get("failureThreshold", 3))
    await asyncio.sleep(probe.get("initialDelaySeconds", 0))
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        verdict.note(await ask(probe, ip, ports))
        if verdict.value is not None:
            yield verdict.value
        await asyncio.sleep(probe.get("periodSeconds", 10) - (loop.time() - began))


async def ask(probe: Object, ip: str, ports: Mapping[str, int]) -> bool:
    """One answer.

    Raises:
        ManifestError: a kind of probe that the chart does not have.
    """
    timeout = probe.get("timeoutSeconds", 1)
    match probe:
        case {"grpc": {"port": port, **rest}}:
            return await _grpc(f"{ip}:{port}", str(rest.get("service", "")), timeout)
        case {"tcpSocket": {"port": port}}:
            return await _tcp(ip, ports.get(port, port), timeout)
    raise ManifestError(f"probe {probe}: not known here")


async def _grpc(address: str, service: str, timeout: float) -> bool:
    # A connection of its own each time, as the kubelet's.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        with suppress(grpc.aio.AioRpcError):
            reply = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout)
            return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
    return False


async def _tcp(ip: str, port: int, timeout: float) -> bool:
    with suppress(OSError):  # TimeoutError is one
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(ip, port)
        writer.close()
        return True
    return False
