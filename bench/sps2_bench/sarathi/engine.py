"""The baseline engine: one process with all cores, chunked prefill with decodes piggybacked, dense attention.

The served model, cache and kernels, so that what differs from SPS2 is the schedule: one batched forward of every
decode row and a chunk of prompts in each step. Greedy, end tokens ignored.
"""

import time
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from sps2_bench.sarathi.batch import MixedBatch, PieceKv
from sps2_bench.sarathi.scheduler import Piece, Request, plan_step
from sps2_engine.kv_pool import BLOCK_TOKENS, BlockPool, KvArena, slot_runs
from sps2_engine.models import Decoder

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Token:
    """One generated token."""

    request_id: int
    index: int
    """Among the tokens of its request, from 0."""
    token_id: int
    last: bool
    """Whether its request ends with it."""


@dataclass(frozen=True)
class Step:
    """What a step gave."""

    tokens: tuple[Token, ...]
    num_prompt_tokens: int
    """Tokens of prompts that it computed."""
    seconds: float
    """From the plan to the last token drawn."""


class SarathiEngine:
    """Takes requests at any time; each `step` computes one batch.

    Args:
        decoder: the model, whole.
        kv_tokens: tokens whose keys and values fit into the cache (rounded up to whole blocks).
        chunk: most tokens of a step.
        kv_dtype: of the cache, and of attention.
        device: where the model is.

    Raises:
        ValueError: `chunk` is below 1.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_tokens: int,
        chunk: int,
        kv_dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        if chunk < 1:
            raise ValueError(f"a step of {chunk} tokens")
        config = decoder.config
        num_blocks = -(-kv_tokens // BLOCK_TOKENS)
        self._decoder = decoder
        self._chunk = chunk
        self._device = device
        self._scale = float(config.head_dim**-0.5)
        self._arena = KvArena(
            config.num_layers, num_blocks, config.num_kv_heads, config.head_dim, kv_dtype, device
        )
        self._pool = BlockPool(num_blocks)
        self._ids = count()
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._blocks: dict[int, list[int]] = {}

    def submit(self, prompt_ids: list[int], max_tokens: int) -> int:
        """Queues a request and returns its id; it waits until there is room for all of its keys and values.

        Raises:
            ValueError: it has no prompt, generates nothing, or does not fit into the cache by itself.
        """
        request = Request(next(self._ids), list(prompt_ids), len(prompt_ids), max_tokens)
        if self._num_blocks(request) > self._pool.num_blocks:
            raise ValueError(f"{request.most_tokens} tokens do not fit into {self._arena.num_slots} slots")
        self._waiting.append(request)
        return request.request_id

    def cancel(self, request_id: int) -> None:
        """Ends a request between two steps and frees what it holds; one that has ended is no news."""
        self._waiting = [one for one in self._waiting if one.request_id != request_id]
        for request in [one for one in self._running if one.request_id == request_id]:
            self._release(request)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not (self._waiting or self._running)

    @property
    def num_blocks_used(self) -> int:
        """Blocks of 64 tokens that requests hold."""
        return self._pool.num_used

    @torch.inference_mode()
    def step(self) -> Step:
        """Computes one batch.

        Raises:
            ValueError: the engine is idle.
        """
        if self.idle:
            raise ValueError("there is nothing to compute")
        started = time.perf_counter()
        self._admit()
        pieces = plan_step(self._running, self._chunk)
        tokens = self._compute(pieces)
        num_prompt = sum(len(piece) for piece in pieces if not piece.decodes)
        return Step(tokens, num_prompt, time.perf_counter() - started)

    def _admit(self) -> None:
        """First come, first served: nobody overtakes a request that waits for room."""
        while self._waiting and self._num_blocks(self._waiting[0]) <= self._pool.num_free:
            request = self._waiting.pop(0)
            self._blocks[request.request_id] = self._pool.allocate(self._num_blocks(request))
            self._running.append(request)

    def _compute(self, pieces: list[Piece]) -> tuple[Token, ...]:
        ids = [token for piece in pieces for token in piece.request.token_ids[piece.begin : piece.end]]
        places = [place for piece in pieces for place in range(piece.begin, piece.end)]
        token_ids, positions = torch.tensor([ids, places], dtype=torch.int64, device=self._device)
        hidden = self._decoder.forward(token_ids, positions, self._batch(pieces))
        for piece in pieces:
            piece.request.num_computed = piece.end
        return self._draw(pieces, hidden)

    def _batch(self, pieces: list[Piece]) -> MixedBatch:
        decodes = [self._kv(piece) for piece in pieces if piece.decodes]
        chunks = [self._kv(piece) for piece in pieces if not piece.decodes]
        return MixedBatch(decodes, chunks, self._arena, self._scale)

    def _kv(self, piece: Piece) -> PieceKv:
        blocks = self._blocks[piece.request.request_id]
        new = slot_runs(blocks, len(piece), piece.begin)
        slots = tuple(slot for run in new for slot in range(*run))
        return PieceKv(piece.begin, slot_runs(blocks, piece.end), slots)

    def _draw(self, pieces: list[Piece], hidden: Tensor) -> tuple[Token, ...]:
        """The next token of each request whose whole text is computed: hidden [rows, hidden]."""
        last_rows, row = [], 0
        for piece in pieces:
            row += len(piece)
            if piece.samples:
                last_rows.append(row - 1)
        if not last_rows:
            return ()
        drawn = self._decoder.logits(hidden[last_rows]).argmax(dim=-1).tolist()
        sampling = [piece.request for piece in pieces if piece.samples]
        return tuple(self._take(request, token) for request, token in zip(sampling, drawn, strict=True))

    def _take(self, request: Request, token_id: int) -> Token:
        request.token_ids.append(token_id)
        last = request.num_generated == request.max_tokens
        if last:
            self._release(request)
        return Token(request.request_id, request.num_generated - 1, token_id, last)

    def _release(self, request: Request) -> None:
        self._running.remove(request)
        self._pool.free(self._blocks.pop(request.request_id))

    @staticmethod
    def _num_blocks(request: Request) -> int:
        return -(-request.most_tokens // BLOCK_TOKENS)
