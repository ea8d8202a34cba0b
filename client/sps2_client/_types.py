"""The nouns that the SDK returns: events, answers, models and the state of the cluster. No wire in here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length"]
"""Why a choice ended: the model's end token, a stop token or a stop string, or `max_tokens` reached."""


@dataclass(frozen=True, slots=True)
class Timings:
    """What one request took by phase, in seconds, as the router measured it."""

    queue: float
    """From arrival until prefill started."""
    prefill: float
    """From the start of prefill until the first token was sampled."""
    transfer: float
    """From the first token until the decode ranks held and had verified every block."""
    ttft: float
    """From arrival at the router until the first token went out."""
    tpot: float
    """Mean time between tokens after the first; 0 with fewer than two."""
    e2e: float
    """From arrival until the last token."""
    tbt_p50: float = 0.0
    """Median time between tokens by the decode leader's clock; 0 where a stop string or the first token was the end."""
    tbt_p99: float = 0.0
    """99th percentile of the same."""


@dataclass(frozen=True, slots=True)
class BytesMoved:
    """Bytes that one request moved between ranks, by plane."""

    collective: int
    """Prefill head exchanges."""
    q_exchange: int
    """Decode Q exchanges and the partial outputs that return."""
    kv_transfer: int
    """KV written from prefill to decode ranks."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took."""

    prompt_tokens: int
    """Tokens of the prompt."""
    cached_tokens: int
    """Of them, taken from cached prefixes."""
    output_tokens: int
    """Tokens generated."""
    timings: Timings
    """Seconds by phase."""
    bytes_moved: BytesMoved
    """Bytes by plane."""
    attention_profile: str
    """Attention that the router resolved: "exact", or the profile and its mask, as in
    "default: N=8 A=4096 levels (1,1),(8,8) sampled tail 64 sinks 0"."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was to the model, before penalties, bias, temperature and filters."""

    logprob: float
    """Natural logarithm of the token's probability."""
    top: tuple[tuple[int, float], ...]
    """Id and the same of the most likely tokens, in descending order; as many as were asked for."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New tokens of a choice and the text that became certain with them."""

    text: str
    """Never half a character; may be empty."""
    token_ids: tuple[int, ...]
    """The tokens, in order."""
    first_index: int
    """Index of the first of them in the choice, from 0."""
    choice_index: int = 0
    """The choice, of a request for several."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token, where the request asked for them."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A choice is complete; its token count and digest were checked."""

    reason: FinishReason
    """Why it ended."""
    token_count: int
    """Its tokens."""
    choice_index: int = 0
    """The choice, of a request for several."""


@dataclass(frozen=True, slots=True)
class UsageReport:
    """The last event of every stream."""

    usage: Usage
    """What the request took."""


Event: TypeAlias = TextDelta | Finished | UsageReport
"""What a stream yields."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a live request has come."""

    phase: str
    """ "queued", "reserving" (it waits for room for its KV), "prefilling", "transferring", "decoding", "ended", or
    "unspecified" where the service knows a phase that this SDK does not."""
    queue_position: int
    """Requests of its router that get a place before it."""
    prefill_fraction: float
    """Part of the prompt that is computed, 0 to 1."""
    num_tokens: int
    """Tokens sent to its client, of all choices."""
    attempt: int
    """Try that is under way, from 1; 0 before the first."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole answer."""

    text: str
    """All text."""
    token_ids: tuple[int, ...]
    """All tokens."""
    finish_reason: FinishReason
    """Why it ended."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token, where the request asked for them."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer; of several, the first, and the others with it."""

    text: str
    """All text."""
    token_ids: tuple[int, ...]
    """All tokens."""
    finish_reason: FinishReason
    """Why it ended."""
    usage: Usage
    """What the request took."""
    request_id: str
    """Id of the request."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token, where the request asked for them."""
    more_choices: tuple[Choice, ...] = ()
    """Choices 1, 2, ... of a request for several."""

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Every choice, in order."""
        return (Choice(self.text, self.token_ids, self.finish_reason, self.logprobs), *self.more_choices)


@dataclass(frozen=True, slots=True)
class Model:
    """A served model."""

    name: str
    """Name that requests use."""
    model_hash: str
    """Hash over config and weight headers, hexadecimal."""
    context_length: int
    """Most tokens of prompt and output together."""
    vocabulary_size: int
    """Token ids are in [0, vocabulary_size)."""
    eos_token_ids: tuple[int, ...]
    """Token ids that end a stream."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One rank as the router last heard of it."""

    worker_id: str
    """ "<group>/<rank>"."""
    role: str
    """ "prefill", "decode" or "unspecified"."""
    group: str
    """Group, for example "decode-0"."""
    rank: int
    """Rank in the group; 0 leads."""
    group_size: int
    """Ranks in the group."""
    epoch: int
    """Life of the group's process group; 0 before the first."""
    state: str
    """ "starting", "ready", "draining" or "unspecified"."""
    grpc_address: str
    """host:port of the supervisor."""
    model_name: str
    """Model it serves."""
    dtype: str
    """Element type of weights and KV."""
    device: str
    """ "cpu" or "cuda"."""
    tensor_ranks: int
    """Tensor ranks of its group: parts that every layer is split into; it holds part `rank % tensor_ranks`."""
    kv_blocks_total: int
    """KV blocks of 64 tokens that it can hold."""
    kv_blocks_used: int
    """Of them, in use."""
    kv_blocks_cached: int
    """Of them, those that hold nothing but cached beginnings of prompts, and are free for whoever needs them."""
    prompt_tokens: int
    """Tokens of the prompts begun in this life (leaders of prefill groups)."""
    cached_tokens: int
    """Of them, taken from the cache."""
    num_requests_running: int
    """Requests being computed."""
    num_requests_waiting: int
    """Requests waiting."""
    queued_tokens: int
    """Prompt tokens waiting or running (prefill)."""
    steps_done: int
    """Steps or slices done in this life."""
    control_share: float
    """Seconds that the leader of a decode group spends on control for each second of steps; 0 on other ranks."""
    load_fraction: float
    """Fraction of the weights loaded, 0 to 1."""
    bytes_posted: Mapping[str, int]
    """Bytes posted since the start, by kind."""
    num_resizes: int
    """Changes of the number of ranks that hold a request's KV (leaders of decode groups)."""
    num_blocks_moved: int
    """KV blocks that went from rank to rank for these and to even out their use (the same)."""


@dataclass(frozen=True, slots=True)
class Resized:
    """Where a request's KV lies after a resize."""

    group: str
    """Its decode group."""
    home: int
    """Rank that runs its dense layers."""
    holders: tuple[int, ...]
    """Ranks that hold its KV, ascending."""
    num_blocks_moved: int
    """KV blocks that moved."""
    longest_gap_s: float
    """Longest time between two tokens meanwhile, in seconds; 0: none came."""
    median_gap_s: float
    """Median time between two tokens since the resize before, or the first, in seconds; 0: too few had come."""


@dataclass(frozen=True, slots=True)
class ClusterState:
    """Every worker that holds a lease, and what this router is serving."""

    workers: tuple[Worker, ...]
    """Workers, ordered by id."""
    directory_connected: bool
    """Whether the router's view is live."""
    num_requests_live: int
    """Requests that this router is serving."""
    num_requests_by_group: Mapping[str, int]
    """The same by group name."""
    num_queued_tokens: int
    """Prompt tokens that wait at this router for their prefill."""


@dataclass(frozen=True, slots=True)
class ClusterChange:
    """The cluster's state (first), or what has changed of it."""

    revision: int
    """Of the workers' state after it, as the directory counts."""
    snapshot: bool
    """Whether `updated` has every worker."""
    updated: tuple[Worker, ...]
    """Workers that are new or have changed, ordered by id."""
    removed: tuple[str, ...]
    """Ids of workers that have left."""
    directory_connected: bool
    """Whether the router's view is live."""
    num_requests_live: int
    """Requests that this router is serving."""
