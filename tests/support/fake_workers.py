"""Scripted prefill and decode leaders, and a directory that lists them: for tests of the router only.

They speak the real protocol over real gRPC and do what their attributes say. `python fake_workers.py` runs a
decode leader in a process of its own, to be killed; it prints "listening on HOST:PORT".
"""

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from sps2.internal.v1 import decode_service_pb2 as decode_pb
from sps2.internal.v1 import decode_service_pb2_grpc as decode_grpc
from sps2.internal.v1 import group_service_pb2 as group_pb
from sps2.internal.v1 import group_service_pb2_grpc as group_grpc
from sps2.internal.v1 import kv_directory_service_pb2 as directory_pb
from sps2.internal.v1 import placement_pb2
from sps2.internal.v1 import prefill_service_pb2 as prefill_pb
from sps2.internal.v1 import prefill_service_pb2_grpc as prefill_grpc
from sps2.v1 import cluster_pb2, generation_pb2
from sps2_service.errors import Unavailable

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class Refusal:
    """A typed error that a worker answers with."""

    code: grpc.StatusCode
    reason: str
    message: str = "scripted"
    retry_after: float | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    async def abort(self, context: Any) -> NoReturn:
        """Ends the call with it."""
        number: int = self.code.value[0]
        status = status_pb2.Status(code=number, message=self.message)
        status.details.add().Pack(
            error_details_pb2.ErrorInfo(reason=self.reason, domain="sps2", metadata=self.metadata)
        )
        if self.retry_after is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(round(self.retry_after * 1e9))
            status.details.add().Pack(retry)
        await context.abort_with_status(rpc_status.to_status(status))
        raise AssertionError("unreachable")


NO_KV = Refusal(grpc.StatusCode.UNAVAILABLE, "NO_KV", "no KV now", retry_after=0.02)
PREEMPTED = Refusal(
    grpc.StatusCode.UNAVAILABLE,
    "PREEMPTED",
    "room given away",
    retry_after=0.02,
    metadata={"component": "decode-0"},
)


def rank_died(component: str) -> Refusal:
    """What a leader says when one of its ranks is gone."""
    return Refusal(
        grpc.StatusCode.UNAVAILABLE, "RANK_DIED", f"{component} died", metadata={"component": component}
    )


class FakeLeader:
    """A gRPC server with a worker's entry in the directory."""

    role: cluster_pb2.WorkerRole.ValueType

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.address = ""
        self.num_live = 0
        """Calls that are being served."""
        self.num_cancelled = 0
        """Calls that ended by cancellation."""
        self.num_drains = 0
        """Times that it was told to drain."""
        self.traceparents: list[str | None] = []
        """Of each call for an attempt."""
        # Otherwise a router that looks after a silent connection is sent away.
        self._server = grpc.aio.server(options=[("grpc.http2.min_ping_interval_without_data_ms", 500)])
        group_grpc.add_GroupServiceServicer_to_server(self, self._server)  # type: ignore[arg-type]

    async def JoinGroup(self, _: Any, context: Context) -> None:  # noqa: N802
        """It has no other ranks."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "a group of one")

    async def DrainGroup(self, _: Any, __: Context) -> group_pb.DrainGroupResponse:  # noqa: N802
        """See group_service.proto."""
        self.num_drains += 1
        return group_pb.DrainGroupResponse(budget_s=7)

    async def start(self, credentials: grpc.ServerCredentials | None = None) -> None:
        """Listens on a free port; `credentials` None: in plaintext."""
        if credentials is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        """Ends every call and the connections."""
        await self._server.stop(None)

    def info(self, **changes: Any) -> cluster_pb2.WorkerInfo:
        """Its entry; a READY leader of a group of one, unless `changes` say otherwise."""
        group, _, rank = self.worker_id.partition("/")
        fields: dict[str, Any] = {
            "worker_id": self.worker_id,
            "role": self.role,
            "group": group,
            "rank": int(rank),
            "group_size": 1,
            "grpc_address": self.address,
            "state": cluster_pb2.WORKER_STATE_READY,
            "capabilities": cluster_pb2.WorkerCapabilities(model_hash="hash", dtype="fp32"),
        }
        return cluster_pb2.WorkerInfo(**fields | changes)

    def _note_trace(self, context: Context) -> None:
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        self.traceparents.append(metadata.get("traceparent"))

    async def _watched(self, events: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Counts a call while it lives."""
        self.num_live += 1
        try:
            async for event in events:
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise
        finally:
            self.num_live -= 1


class FakePrefill(FakeLeader):
    """A prefill leader."""

    role = cluster_pb2.WORKER_ROLE_PREFILL

    def __init__(self, worker_id: str = "prefill-0/0") -> None:
        super().__init__(worker_id)
        self.first_token = ord("a") + 2
        self.tokens: Sequence[int] = [ord(one) + 2 for one in "bcd"]
        """Its samples behind tokens that were generated before: the one that follows as many."""
        self.tokens_by_choice: dict[int, Sequence[int]] = {}
        """Instead of `tokens`, for choices that go on."""
        self.finish_reason: generation_pb2.FinishReason.ValueType = generation_pb2.FINISH_REASON_UNSPECIFIED
        self.logprob: generation_pb2.TokenLogprob | None = None
        self.refusals: list[Refusal] = []
        """Answers of the next calls, before anything else."""
        self.dies_before_delivery = False
        """Fail after the first token instead of delivering."""
        self.may_sample = asyncio.Event()
        self.may_sample.set()
        """Cleared: it computes forever."""
        self.compute_s = 0.0
        """What a prompt takes; one is computed after the other."""
        self._computing = asyncio.Lock()
        self.progress_interval_s = 0.02
        self.reports_progress = True
        self.requests: list[prefill_pb.PrefillRequest] = []
        prefill_grpc.add_PrefillServiceServicer_to_server(self, self._server)  # type: ignore[arg-type]

    async def Prefill(  # noqa: N802
        self, request: prefill_pb.PrefillRequest, context: Context
    ) -> AsyncIterator[prefill_pb.PrefillResponse]:
        """See prefill_service.proto."""
        self.requests.append(request)
        self._note_trace(context)
        async for event in self._watched(self._events(context)):
            yield event

    async def SendPrefix(self, _: Any, context: Context) -> None:  # noqa: N802
        """It has nothing cached."""
        await context.abort(grpc.StatusCode.NOT_FOUND, "nothing is cached here")

    def _first_token(self, choice: prefill_pb.TokenChoice) -> prefill_pb.FirstToken:
        num_generated = len(choice.generated_token_ids)
        script = self.tokens_by_choice.get(choice.sampling.first_choice, self.tokens)
        token_id = script[num_generated - 1] if num_generated else self.first_token
        return prefill_pb.FirstToken(
            token_id=token_id, finish_reason=self.finish_reason, logprob=self.logprob
        )

    async def _events(self, context: Context) -> AsyncIterator[prefill_pb.PrefillResponse]:
        choice = self.requests[-1].choice
        if self.refusals:
            await self.refusals.pop(0).abort(context)
        async with self._computing:
            yield prefill_pb.PrefillResponse(started=prefill_pb.PrefillStarted())
            await asyncio.sleep(self.compute_s)
        while not self.may_sample.is_set():
            await asyncio.sleep(self.progress_interval_s)
            if self.reports_progress:
                yield prefill_pb.PrefillResponse(progress=prefill_pb.PrefillProgress(fraction=0.5))
        first = self._first_token(choice)
        first.more_choices.extend(self._first_token(choice) for _ in range(1, choice.num_choices))
        yield prefill_pb.PrefillResponse(first_token=first)
        if self.dies_before_delivery:
            await rank_died("prefill-0/1").abort(context)
        delivered = prefill_pb.PrefillDelivered(collective_bytes=100, kv_transfer_bytes=300)
        yield prefill_pb.PrefillResponse(delivered=delivered)


class FakeDecode(FakeLeader):
    """A decode leader."""

    role = cluster_pb2.WORKER_ROLE_DECODE

    def __init__(self, worker_id: str = "decode-0/0") -> None:
        super().__init__(worker_id)
        self.tokens: Sequence[int] = [ord(one) + 2 for one in "bcd"]
        """What follows the first token; an attempt that goes on sends what is left of it."""
        self.reason: generation_pb2.FinishReason.ValueType = generation_pb2.FINISH_REASON_LENGTH
        self.refusals: list[Refusal] = []
        """Answers to the next reservations."""
        self.refuse_commit: list[Refusal] = []
        """Answers to the next starts, instead of the commit."""
        self.fail_after: list[tuple[int, Refusal]] = []
        """For each of the next attempts: tokens to send, then how to fail."""
        self.index_shift = 0
        """Added to the indices of all tokens but the first two."""
        self.ends_without_finish = False
        self.rounds: int | None = None
        """All tokens go in one message, this many times."""
        self.pause_s = 0.0
        """Between tokens."""
        self.may_commit = asyncio.Event()
        self.may_commit.set()
        """Cleared: it waits for KV forever."""
        self.num_sent = 0
        self.reserved: list[decode_pb.ReserveKv] = []
        self.started: list[int] = []
        self.starts: list[decode_pb.StartDecode] = []
        self.stopped: list[int] = []
        """Choices that were stopped."""
        self.logprob: generation_pb2.TokenLogprob | None = None
        """Of every token."""
        self.tokens_by_choice: dict[int, Sequence[int]] = {}
        """Instead of `tokens`, when there are several choices; they take turns."""
        decode_grpc.add_DecodeServiceServicer_to_server(self, self._server)  # type: ignore[arg-type]

    async def Decode(  # noqa: N802
        self, requests: AsyncIterator[decode_pb.DecodeRequest], context: Context
    ) -> AsyncIterator[decode_pb.DecodeResponse]:
        """See decode_service.proto."""
        self._note_trace(context)
        async for event in self._watched(self._events(requests, context)):
            yield event

    async def ResizeAttempt(  # noqa: N802
        self, request: decode_pb.ResizeAttemptRequest, context: Context
    ) -> decode_pb.ResizeAttemptResponse:
        """See decode_service.proto: what was reserved is spread as asked, at once."""
        if request.request_id not in {one.attempt.request_id for one in self.reserved}:
            await Refusal(grpc.StatusCode.NOT_FOUND, "UNKNOWN_REQUEST").abort(context)
        holders = request.ranks or range(request.degree)
        return decode_pb.ResizeAttemptResponse(group=self.worker_id.partition("/")[0], holders=holders)

    async def _events(
        self, requests: AsyncIterator[decode_pb.DecodeRequest], context: Context
    ) -> AsyncIterator[decode_pb.DecodeResponse]:
        first = await anext(requests, None)
        assert first is not None
        reserve = first.reserve
        self.reserved.append(reserve)
        if self.refusals:
            await self.refusals.pop(0).abort(context)
        shard = placement_pb2.ShardPlacement(token_end=reserve.num_prompt_tokens)
        placement = placement_pb2.Placement(group=self.worker_id.partition("/")[0], shards=[shard])
        yield decode_pb.DecodeResponse(placement=placement)
        start = await anext(requests, None)
        if start is None:
            raise asyncio.CancelledError  # the router ended the call before it had a first token
        self.started.append(start.start.first_token_id)
        self.starts.append(start.start)
        await self.may_commit.wait()
        if self.refuse_commit:
            await self.refuse_commit.pop(0).abort(context)
        yield decode_pb.DecodeResponse(committed=decode_pb.DecodeCommitted())
        num_generated = len(reserve.choice.generated_token_ids)
        if self.tokens_by_choice and not num_generated:
            tokens = self._choices(requests, context)
        elif self.tokens_by_choice:
            choice = reserve.choice.sampling.first_choice
            tokens = self._tokens(context, self.tokens_by_choice[choice], num_generated)
        else:
            tokens = self._tokens(context, self.tokens, num_generated)
        async for event in tokens:
            yield event

    def _messages(self, token_ids: Sequence[int]) -> Iterable[Sequence[int]]:
        if self.rounds is None:
            return ([one] for one in token_ids)
        return itertools.repeat(token_ids, self.rounds)

    async def _tokens(
        self, context: Context, script: Sequence[int], num_generated: int
    ) -> AsyncIterator[decode_pb.DecodeResponse]:
        index = 1 + num_generated
        failure = self.fail_after.pop(0) if self.fail_after else None
        for sent, token_ids in enumerate(itertools.chain(self._messages(script[num_generated:]), [()])):
            if failure is not None and sent == failure[0]:
                await failure[1].abort(context)
            if not token_ids:
                break
            if self.pause_s:
                await asyncio.sleep(self.pause_s)
            shift = self.index_shift if index > 1 else 0
            tokens = decode_pb.DecodedTokens(first_index=index + shift, token_ids=token_ids)
            yield decode_pb.DecodeResponse(tokens=tokens)
            self.num_sent += 1
            index += len(token_ids)
        if not self.ends_without_finish:
            finished = decode_pb.DecodeFinished(reason=self.reason, q_exchange_bytes=200, num_holders=1)
            yield decode_pb.DecodeResponse(finished=finished)

    async def _choices(
        self, requests: AsyncIterator[decode_pb.DecodeRequest], context: Context
    ) -> AsyncIterator[decode_pb.DecodeResponse]:
        """All of each choice's tokens in turns, also those of a stopped one; then all end."""
        failure = self.fail_after.pop(0) if self.fail_after else None
        # A call cannot be aborted while it is being read.
        reading = None if failure else asyncio.create_task(self._note_stops(requests))
        longest = max(map(len, self.tokens_by_choice.values()))
        for place in range(longest):
            if failure is not None and place == failure[0]:
                await failure[1].abort(context)
            for choice, tokens in self.tokens_by_choice.items():
                if place < len(tokens):
                    await asyncio.sleep(self.pause_s)
                    yield self._choice_token(choice, place + 1, tokens[place])
        for choice in self.tokens_by_choice:
            finished = decode_pb.DecodeFinished(
                reason=self.reason, q_exchange_bytes=200, num_holders=1, choice_index=choice
            )
            yield decode_pb.DecodeResponse(finished=finished)
        if reading is not None:
            await reading

    def _choice_token(self, choice: int, index: int, token_id: int) -> decode_pb.DecodeResponse:
        tokens = decode_pb.DecodedTokens(
            first_index=index,
            token_ids=[token_id],
            choice_index=choice,
            logprobs=[self.logprob] if self.logprob else [],
            q_exchange_bytes=index,
        )
        return decode_pb.DecodeResponse(tokens=tokens)

    async def _note_stops(self, requests: AsyncIterator[decode_pb.DecodeRequest]) -> None:
        async for request in requests:
            self.stopped.append(request.stop.choice_index)


class FakeView:
    """A membership view that a test fills by hand."""

    def __init__(self) -> None:
        self.workers: dict[str, cluster_pb2.WorkerInfo] = {}
        self.connected = True
        self.revision = 0
        self.changed = asyncio.Condition()

    async def put(self, *workers: cluster_pb2.WorkerInfo) -> None:
        """Adds or replaces workers."""
        async with self.changed:
            self.workers.update({worker.worker_id: worker for worker in workers})
            self.revision += 1
            self.changed.notify_all()

    async def run(self) -> None:
        """As Membership: until cancelled."""
        await asyncio.Event().wait()


class FakeRequestDirectory:
    """What a directory knows of requests, for the routers of a test; see admit.lua."""

    def __init__(self) -> None:
        self.admitted: dict[str, directory_pb.RequestAdmission] = {}
        self.is_away = False
        self.prefixes: list[directory_pb.PrefixMatch] = []
        """Who holds the beginning of whatever chain is asked for."""

    async def find_prefix(self, keys: Sequence[bytes]) -> list[directory_pb.PrefixMatch]:
        """Who holds how many of the first keys."""
        return [
            directory_pb.PrefixMatch(holder=one.holder, num_keys=min(one.num_keys, len(keys)))
            for one in self.prefixes
        ]

    async def admit(
        self, admissions: Sequence[directory_pb.RequestAdmission], lease_s: float
    ) -> Sequence[directory_pb.AdmissionResult]:
        """Answers in order."""
        self._check()
        return [self._admit(one) for one in admissions]

    def dismiss(self, request_id: str, call_id: str) -> None:
        """Forgets a call."""
        if request_id in self.admitted and self.admitted[request_id].call_id == call_id:
            del self.admitted[request_id]

    async def locate_call(self, request_id: str) -> directory_pb.RequestAdmission | None:
        """The call of a request."""
        self._check()
        return self.admitted.get(request_id)

    def _check(self) -> None:
        if self.is_away:
            raise Unavailable("STORE_AWAY", "scripted", retry_after=1.0)

    def _admit(self, one: directory_pb.RequestAdmission) -> directory_pb.AdmissionResult:
        other = self.admitted.get(one.request_id)
        status = directory_pb.ADMISSION_STATUS_ADMITTED
        if other is not None and other.call_id != one.call_id:
            if one.renewal or not one.nonce or one.nonce != other.nonce:
                return directory_pb.AdmissionResult(status=directory_pb.ADMISSION_STATUS_REFUSED, other=other)
            status = directory_pb.ADMISSION_STATUS_SUPERSEDES
        self.admitted[one.request_id] = one
        return directory_pb.AdmissionResult(status=status, other=other)


class FakeDirectory:
    """A directory whose watch sends one snapshot."""

    def __init__(self) -> None:
        self.workers: list[cluster_pb2.WorkerInfo] = []
        self.address = ""
        self._server = grpc.aio.server()
        watch = grpc.unary_stream_rpc_method_handler(
            self._watch_workers,
            request_deserializer=directory_pb.WatchWorkersRequest.FromString,
            response_serializer=directory_pb.WatchWorkersResponse.SerializeToString,
        )
        service = "sps2.internal.v1.KvDirectoryService"
        handler = grpc.method_handlers_generic_handler(service, {"WatchWorkers": watch})
        self._server.add_generic_rpc_handlers((handler,))

    async def _watch_workers(
        self, request: directory_pb.WatchWorkersRequest, context: Any
    ) -> AsyncIterator[directory_pb.WatchWorkersResponse]:
        yield directory_pb.WatchWorkersResponse(
            revision=1, snapshot=directory_pb.WorkerSnapshot(workers=self.workers)
        )
        await asyncio.Event().wait()

    async def start(self) -> None:
        """Listens on a free port."""
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        """Ends the watches."""
        await self._server.stop(None)


async def _main() -> None:
    leader = FakeDecode()
    leader.tokens = [ord("b") + 2] * 400
    leader.pause_s = 0.02
    await leader.start()
    sys.stdout.write(f"listening on {leader.address}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
