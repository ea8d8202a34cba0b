"""The router's nouns: the model it serves, a checked request, the groups that can serve it.

Plain data with invariants; knows nothing about gRPC calls, clocks or tokenizing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from sps2.v1 import cluster_pb2
from sps2_layout.attention import Attention
from sps2_service.request_fields import Vocabulary


@dataclass(frozen=True)
class ServedModel:
    """The one model of this deployment."""

    name: str
    """Name that requests use."""
    model_hash: str
    """Hexadecimal; a group whose hash differs serves something else and is never picked."""
    context_length: int
    """Most tokens of prompt and output together."""
    vocabulary_size: int
    """Token ids are in [0, vocabulary_size)."""
    eos_token_ids: tuple[int, ...]
    """Ids that end a stream unless the request ignores them."""
    keys_per_token: int = 1536
    """So many keys that a token sees cost as much as what else it costs."""

    @property
    def vocabulary(self) -> Vocabulary:
        """For checks."""
        return Vocabulary(self.name, self.vocabulary_size)


@dataclass(frozen=True)
class TokenChoice:
    """How tokens are chosen and when a choice ends; every value resolved."""

    temperature: float
    """0 is greedy."""
    top_p: float
    """In (0, 1]; 1 is off."""
    top_k: int
    """-1 is off."""
    seed: int
    """Of the counter-based random numbers, in [0, 2^64)."""
    stop_token_ids: tuple[int, ...]
    """Ids that end the choice, the model's own end tokens included; never text."""
    max_tokens: int
    """Most tokens to generate, >= 1."""
    min_p: float = 0.0
    """In [0, 1]; 0 is off."""
    repetition_penalty: float = 1.0
    """In [0.01, 100]; 1 is off."""
    presence_penalty: float = 0.0
    """In [-2, 2]; 0 is off."""
    frequency_penalty: float = 0.0
    """In [-2, 2]; 0 is off."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """By token id, each in [-100, 100]."""
    min_tokens: int = 0
    """Fewer tokens do not end with a stop token or a stop string; at most max_tokens."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end the choice; the router's to find."""
    num_logprobs: int | None = None
    """Most likely tokens to report with each token, up to 20; None reports no log probabilities."""
    num_choices: int = 1
    """Answers to draw."""
    first_choice: int = 0
    """Index of the first of them in the key of the random numbers."""


class Reuse(Enum):
    """Which KV of earlier prompts a request may begin with; see PrefixReuse in generation.proto."""

    EXACT = auto()
    ADOPT = auto()
    OFF = auto()


@dataclass(frozen=True)
class Request:
    """One admitted request. Everything that an attempt needs is in here, so attempts are alike."""

    request_id: str
    """Unique among this router's live requests."""
    prompt_ids: Sequence[int]
    """The prompt's token ids, at least one."""
    choice: TokenChoice
    """How it is answered."""
    attention: Attention
    """How the prompt is attended."""
    attention_profile: str
    """The same for people, with the name of the profile that chose it."""
    block_hashes: Sequence[bytes] = ()
    """Names of the prompt's full blocks, by which a decode group finds those that it holds already."""
    generated_ids: Sequence[int] = ()
    """Tokens that its only choice has from earlier attempts; an attempt goes on behind them."""
    priority: int = 0
    """Steps of 10 s that it goes before others; see `sps2_service.turns`."""
    tenant: str = ""
    """Whose it is; empty where no tokens are asked for."""
    reuse: Reuse = Reuse.ADOPT
    """Which cached KV it may begin with."""
    cached: Mapping[str, int] = field(default_factory=dict)
    """By prefill group: leading tokens of which it is said to hold KV that this request can use."""
    holders: Mapping[str, str] = field(default_factory=dict)
    """The addresses of their leaders."""

    def __post_init__(self) -> None:
        """A request without a prompt cannot be served."""
        if not self.prompt_ids:
            raise ValueError("a request has at least one prompt token")
        if self.generated_ids and self.choice.num_choices != 1:
            raise ValueError("choices go on one by one")

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def token_ids(self) -> Sequence[int]:
        """What prefill computes: the prompt, then what was generated."""
        return [*self.prompt_ids, *self.generated_ids] if self.generated_ids else self.prompt_ids

    @property
    def num_tokens(self) -> int:
        """Tokens that prefill computes."""
        return len(self.prompt_ids) + len(self.generated_ids)

    def resumed(self, index: int, generated_ids: Sequence[int]) -> "Request":
        """One of its choices alone, from where it has come to."""
        choice = replace(self.choice, num_choices=1, first_choice=self.choice.first_choice + index)
        return replace(self, choice=choice, generated_ids=tuple(generated_ids))


@dataclass(frozen=True)
class Group:
    """The ranks of one group as the membership view has them."""

    name: str
    """For example "decode-0"."""
    role: cluster_pb2.WorkerRole.ValueType
    """Pool."""
    workers: tuple[cluster_pb2.WorkerInfo, ...]
    """Ranks that hold a lease, by rank; may be fewer than `size`."""

    @property
    def size(self) -> int:
        """Ranks that the group should have."""
        return max(worker.group_size for worker in self.workers)

    @property
    def leader(self) -> cluster_pb2.WorkerInfo | None:
        """Rank 0, the one that takes requests; None while it holds no lease."""
        first = self.workers[0]
        return first if first.rank == 0 else None

    @property
    def ready(self) -> bool:
        """Whether it takes requests: its leader is READY, which it is only while the group stands."""
        leader = self.leader
        return leader is not None and leader.state == cluster_pb2.WORKER_STATE_READY

    @property
    def draining(self) -> bool:
        """Whether it finishes what it has and takes no more."""
        return self.leader is not None and self.leader.state == cluster_pb2.WORKER_STATE_DRAINING

    @property
    def short_prompt_tokens(self) -> int:
        """Tokens of the longest prompt that it computes while it computes longer ones; 0: none."""
        return self.leader.load.short_prompt_tokens if self.leader is not None else 0

    @property
    def fetched_token_cost(self) -> float:
        """What a token costs it that another prefill group has cached, in tokens that it computes; 1: no less."""
        return (self.leader.load.fetched_token_cost if self.leader is not None else 0.0) or 1.0

    @property
    def num_ready(self) -> int:
        """Ranks that are READY."""
        return sum(worker.state == cluster_pb2.WORKER_STATE_READY for worker in self.workers)


@dataclass(frozen=True)
class GroupPair:
    """A prefill and a decode group that work together: same model, same element type, both ready."""

    prefill: Group
    """Computes the prompt."""
    decode: Group
    """Decodes."""

    def __post_init__(self) -> None:
        """A pair without both leaders takes no request."""
        if self.prefill.leader is None or self.decode.leader is None:
            raise ValueError("a pair needs both leaders")

    @property
    def prefill_leader(self) -> cluster_pb2.WorkerInfo:
        """Rank 0 of the prefill group."""
        assert self.prefill.leader is not None
        return self.prefill.leader

    @property
    def decode_leader(self) -> cluster_pb2.WorkerInfo:
        """Rank 0 of the decode group."""
        assert self.decode.leader is not None
        return self.decode.leader


def group_workers(workers: Iterable[cluster_pb2.WorkerInfo]) -> Mapping[str, Group]:
    """The groups that the workers form, by name in name order."""
    by_group: dict[str, list[cluster_pb2.WorkerInfo]] = {}
    for worker in workers:
        by_group.setdefault(worker.group, []).append(worker)
    return {
        name: Group(name, members[0].role, tuple(sorted(members, key=lambda worker: worker.rank)))
        for name, members in sorted(by_group.items())
    }
