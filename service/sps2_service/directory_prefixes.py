"""Keeps the directory told of the prefix blocks that a worker's group holds, without anybody waiting for it.

What cannot be told is told again when the worker registers anew; until then a prefix that nobody finds is computed,
and one that is found in vain too.
"""

from collections.abc import Callable, Iterator, Sequence

from sps2.internal.v1 import kv_directory_service_pb2 as pb
from sps2.internal.v1.kv_directory_service_pb2_grpc import KvDirectoryServiceStub
from sps2.internal.v1.placement_pb2 import AttentionLayout
from sps2.v1.cluster_pb2 import WorkerInfo
from sps2_service.directory_recorder import Recorder
from sps2_service.directory_rpc import DirectoryOptions, call

MAX_KEYS = 64
"""Of one call."""
_LANE = "prefixes"
"""All calls go in the order in which they were made."""


class HeldPrefixes:
    """What one worker holds, as the directory is to know it."""

    def __init__(
        self,
        stub: KvDirectoryServiceStub,
        recorder: Recorder,
        get_worker: Callable[[], WorkerInfo],
        options: DirectoryOptions,
    ) -> None:
        self._stub = stub
        self._recorder = recorder
        self._get_worker = get_worker
        self._options = options
        self._keys: dict[bytes, dict[bytes, None]] = {}
        """By the attention that they were made under, in the order in which they came."""

    def hold(self, attention: AttentionLayout, keys: Sequence[bytes]) -> None:
        """The group holds these blocks from now on; told again until they are dropped."""
        self._keys.setdefault(_packed(attention), {}).update(dict.fromkeys(keys))
        self._record(attention, keys)

    def drop(self, attention: AttentionLayout, keys: Sequence[bytes]) -> None:
        """It holds them no more."""
        packed = _packed(attention)
        kept = self._keys.get(packed, {})
        for key in keys:
            kept.pop(key, None)
        if not kept:
            self._keys.pop(packed, None)
        holder = self._holder(attention)
        for some in _in_calls(keys):
            request = pb.EvictPrefixRequest(holder=holder, keys=some)
            self._submit(self._stub.EvictPrefix, request)

    def drop_all(self) -> None:
        """It holds nothing: its epoch is over, and what was told in it is void by itself."""
        self._keys.clear()

    def tell_again(self) -> None:
        """The worker has registered anew, perhaps because the directory lost its data."""
        for packed, keys in self._keys.items():
            self._record(AttentionLayout.FromString(packed), list(keys))

    def _record(self, attention: AttentionLayout, keys: Sequence[bytes]) -> None:
        holder = self._holder(attention)
        for some in _in_calls(keys):
            request = pb.RecordPrefixRequest(holder=holder, keys=some)
            self._submit(self._stub.RecordPrefix, request)

    def _submit(self, method: Callable[..., object], request: object) -> None:
        self._recorder.submit(_LANE, lambda: call(method, request, self._options.timeout_s))  # type: ignore[arg-type]

    def _holder(self, attention: AttentionLayout) -> pb.PrefixHolder:
        worker = self._get_worker()
        return pb.PrefixHolder(
            worker_id=worker.worker_id,
            process_incarnation=worker.process_incarnation,
            epoch=worker.epoch,
            attention=attention,
        )


def _packed(attention: AttentionLayout) -> bytes:
    return attention.SerializeToString(deterministic=True)


def _in_calls(keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    return (keys[begin : begin + MAX_KEYS] for begin in range(0, len(keys), MAX_KEYS))
