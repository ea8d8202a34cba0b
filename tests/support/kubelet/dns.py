"""The cluster's name server: Services and the pods behind headless ones, by UDP; everything else does not exist."""

import asyncio
import struct
from collections.abc import Callable, Sequence
from typing import cast

DOMAIN = "cluster.local"
TTL_S = 5
A, ANY_CLASS = 1, 1
NXDOMAIN = 3

Resolve = Callable[[str], Sequence[str] | None]
"""IPv4 addresses of a full name without the final dot; None where there is no such name."""


def resolv_conf(server: str, namespace: str) -> str:
    """What the kubelet writes into a pod with dnsPolicy ClusterFirst."""
    search = f"{namespace}.svc.{DOMAIN} svc.{DOMAIN} {DOMAIN}"
    return f"search {search}\nnameserver {server}\noptions ndots:5\n"


def answer(query: bytes, resolve: Resolve) -> bytes:
    """The reply to one query of one question."""
    name, end = _question(query)
    (kind,) = struct.unpack_from("!H", query, end - 4)
    found = resolve(name)
    addresses = found if found is not None and kind == A else ()
    flags = 0x8580 | (
        NXDOMAIN if found is None else 0
    )  # response, authoritative, recursion desired and available
    header = query[:2] + struct.pack("!HHHHH", flags, 1, len(addresses), 0, 0)
    return header + query[12:end] + b"".join(_record(address) for address in addresses)


def _question(query: bytes) -> tuple[str, int]:
    """Its name, and where it ends."""
    labels, at = [], 12
    while length := query[at]:
        labels.append(query[at + 1 : at + 1 + length].decode("ascii"))
        at += 1 + length
    return ".".join(labels).lower(), at + 5


def _record(address: str) -> bytes:
    data = bytes(int(part) for part in address.split("."))
    return (
        struct.pack("!HHHIH", 0xC00C, A, ANY_CLASS, TTL_S, len(data)) + data
    )  # the name: that of the question


class NameServer(asyncio.DatagramProtocol):
    """Answers each query by itself."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = cast("asyncio.DatagramTransport", transport)  # what it is, though not by its class

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """See asyncio."""
        assert self._transport is not None
        self._transport.sendto(answer(data, self._resolve), addr)
