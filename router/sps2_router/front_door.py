"""What happens to a call before and around its attempts: checks, its id, its time, its tokens.

The one place that knows the order: fields, room in the queue, id, tokenizing, context length, block hashes, what is
cached, dispatch.
Servicers call it.
"""

import asyncio
import secrets
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from sps2.v1 import generation_pb2
from sps2_layout.block_hash import block_hashes
from sps2_layout.profiles import Ladder
from sps2_router.admission import Admission, LiveRequest
from sps2_router.answer import Send
from sps2_router.call import Call
from sps2_router.claims import Claims
from sps2_router.dispatch import Dispatcher
from sps2_router.metrics import RouterMetrics
from sps2_router.peers import Peers
from sps2_router.prefix_reuse import HeldPrefix, with_reuse
from sps2_router.prompt_ids import ids_of_chat, ids_of_text, least_tokens
from sps2_router.relay import Event
from sps2_router.request_trace import RequestTrace
from sps2_router.scope import CallScope
from sps2_router.tokenizer import ModelTokenizer
from sps2_router.types import Reuse, ServedModel
from sps2_router.validation import check_fields, resolve
from sps2_service.telemetry import bind_request
from sps2_service.trace_context import current_place
from sps2_service.tracing import Tracing
from sps2_service.turns import now_us, turn_us


@dataclass(frozen=True)
class TimeLimits:
    """How long a request may take, in seconds."""

    total_s: float = 3600.0
    """From arrival to the last event; a client's own shorter deadline counts instead."""
    silence_s: float = 300.0
    """Without any event, progress of the prefill included; waiting in the queue is none, it has bounds of its own."""


FindHeld: TypeAlias = Callable[[Sequence[bytes]], Awaitable[list[HeldPrefix]]]
"""Tells which groups hold the beginning of a chain of blocks."""


class FrontDoor:
    """Takes specs, gives events."""

    def __init__(
        self,
        model: ServedModel,
        tokenizer: ModelTokenizer,
        admission: Admission,
        dispatcher: Dispatcher,
        limits: TimeLimits,
        ladder: Ladder,
        claims: Claims,
        peers: Peers,
        find_held: FindHeld,
        metrics: RouterMetrics,
        tracing: Tracing | None = None,
    ) -> None:
        """`ladder` is the attention profile of requests that name none."""
        self._model = model
        self._tokenizer = tokenizer
        self._admission = admission
        self._dispatcher = dispatcher
        self._limits = limits
        self._ladder = ladder
        self._claims = claims
        self._peers = peers
        self._find_held = find_held
        self._metrics = metrics
        self._tracing = tracing

    async def generate(self, spec: generation_pb2.GenerationSpec, call: Call, send: Send) -> str:
        """Serves one call and returns the request's id.

        Args:
            spec: As it came.
            call: What came with it.
            send: Gets each event; not called before the commit point.

        Raises:
            ServiceError: what the client gets instead, or after the events so far.
        """
        arrived_at = asyncio.get_running_loop().time()
        with (
            RequestTrace(self._tracing, current_place.get(), arrived_at) as trace,
            self._metrics.call() as outcome,
        ):
            check_fields(spec, self._model)
            request_id = spec.request_id or uuid.uuid4().hex
            bind_request(request_id)
            trace.asked(spec, request_id, self._model.name)
            outcome.finish_reason = await self._admit(spec, request_id, call, send, trace)
        return request_id

    async def _admit(
        self,
        spec: generation_pb2.GenerationSpec,
        request_id: str,
        call: Call,
        send: Send,
        trace: RequestTrace,
    ) -> generation_pb2.FinishReason.ValueType:
        tenant, limit = call.caller.tenant, self._limits.total_s
        total_s = limit if call.time_left is None else min(call.time_left, limit)
        num_tokens = least_tokens(spec, self._tokenizer.longest_token)
        # Before anything is spent on it: however short its prompt may be, there may be no room, or the wait too long.
        self._dispatcher.check_room(num_tokens, tenant, turn_us(now_us(), spec.priority), total_s)
        with (
            CallScope(total_s=total_s, silence_s=self._limits.silence_s) as scope,
            self._admission.register(request_id, spec.nonce, scope, tenant, spec.retry) as live,
        ):
            live.trace = trace
            async with self._claims.hold(
                live, lambda earlier: self._peers.supersede(earlier, call.authorization)
            ) as settled:
                return await self._serve(spec, live, _after(settled, send))

    async def _serve(
        self, spec: generation_pb2.GenerationSpec, live: LiveRequest, send: Send
    ) -> generation_pb2.FinishReason.ValueType:
        prompt_ids = await self._prompt_ids(spec)
        seed = secrets.randbits(64)
        request = resolve(spec, live.request_id, prompt_ids, self._model, seed, self._ladder)
        # On a thread: 1.5 ms for 64k tokens, which the streams of others need not wait for.
        salt = tenant_salt(live.tenant)
        hashes = await asyncio.to_thread(block_hashes, prompt_ids, self._model.model_hash, salt)
        request = replace(request, block_hashes=hashes, tenant=live.tenant)
        if hashes and request.reuse is not Reuse.OFF:
            request = with_reuse(request, await self._find_held(hashes), self._model.keys_per_token)
        live.trace.resolved(request)
        return await self._dispatcher.serve(request, live, live.trace.arrived_at, send)

    async def _prompt_ids(self, spec: generation_pb2.GenerationSpec) -> Sequence[int]:
        if spec.HasField("text"):
            return await ids_of_text(spec.text, self._tokenizer, self._model, "spec.text")
        if spec.HasField("chat"):
            return await ids_of_chat(spec.chat, self._tokenizer, self._model, "spec.chat")
        return spec.token_ids.ids


def tenant_salt(tenant: str) -> bytes:
    """Blocks are shared among requests of one salt: a tenant's own, or all where no tokens are asked for."""
    return b"sps2" + tenant.encode()


def _after(settled: Callable[[], Awaitable[None]], send: Send) -> Send:
    """The same, but nothing goes out before it is settled whose the request is."""
    is_settled = False

    async def send_after(event: Event) -> None:
        nonlocal is_settled
        if not is_settled:
            await settled()
            is_settled = True
        await send(event)

    return send_after
