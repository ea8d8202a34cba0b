"""What happens to a call before and around its attempts: checks, its id, its time, its tokens.

The one place that knows the order: fields, id, tokenizing, context length, block hashes, dispatch. Servicers call it.
"""

import asyncio
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sps2.v1 import generation_pb2
from sps2_layout.block_hash import block_hashes
from sps2_layout.profiles import Ladder
from sps2_router.admission import Admission
from sps2_router.answer import Send
from sps2_router.dispatch import Dispatcher
from sps2_router.scope import CallScope
from sps2_router.tokenizer import ModelTokenizer
from sps2_router.types import ServedModel
from sps2_router.validation import check_fields, check_text_length, resolve
from sps2_service.telemetry import bound_request

TENANT_SALT = b"sps2"
"""Blocks are shared among requests of one salt: all of a deployment's, while requests name no tenant."""


@dataclass(frozen=True)
class TimeLimits:
    """How long a request may take, in seconds."""

    total_s: float = 3600.0
    """From arrival to the last event; a client's own shorter deadline counts instead."""
    silence_s: float = 300.0
    """Without any event, progress of the prefill included; waiting in the queue is none, it has bounds of its own."""


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
    ) -> None:
        """`ladder` is the attention profile of requests that name none."""
        self._model = model
        self._tokenizer = tokenizer
        self._admission = admission
        self._dispatcher = dispatcher
        self._limits = limits
        self._ladder = ladder

    async def generate(self, spec: generation_pb2.GenerationSpec, time_left: float | None, send: Send) -> str:
        """Serves one call and returns the request's id.

        Args:
            spec: As it came.
            time_left: Seconds until the client's deadline; None without one.
            send: Gets each event; not called before the commit point.

        Raises:
            ServiceError: what the client gets instead, or after the events so far.
        """
        arrived_at = asyncio.get_running_loop().time()
        check_fields(spec, self._model)
        request_id = spec.request_id or uuid.uuid4().hex
        total_s = self._limits.total_s if time_left is None else min(time_left, self._limits.total_s)
        with (
            bound_request(request_id),
            CallScope(total_s=total_s, silence_s=self._limits.silence_s) as scope,
            self._admission.register(request_id, spec.nonce, scope) as live,
        ):
            prompt_ids = await self._prompt_ids(spec)
            seed = secrets.randbits(64)
            request = resolve(spec, request_id, prompt_ids, self._model, seed, self._ladder)
            # On a thread: 1.5 ms for 64k tokens, which the streams of others need not wait for.
            hashes = await asyncio.to_thread(block_hashes, prompt_ids, self._model.model_hash, TENANT_SALT)
            await self._dispatcher.serve(replace(request, block_hashes=hashes), live, arrived_at, send)
        return request_id

    async def _prompt_ids(self, spec: generation_pb2.GenerationSpec) -> Sequence[int]:
        if spec.HasField("text"):
            check_text_length(spec.text, self._tokenizer.longest_token, self._model)
            return await self._tokenizer.encode(spec.text)
        return spec.token_ids.ids
