"""Arguments of a generation to the wire's request. Pure but for the random id and nonce."""

import secrets
import uuid
from collections.abc import Mapping, Sequence
from typing import TypedDict, Unpack

from sps2.v1 import generation_pb2, inference_service_pb2, tokenizer_service_pb2

NONCE_BYTES = 16
PREFIX_REUSES: "Mapping[str, generation_pb2.PrefixReuse.ValueType]" = {
    "": generation_pb2.PREFIX_REUSE_UNSPECIFIED,
    "exact": generation_pb2.PREFIX_REUSE_EXACT,
    "adopt": generation_pb2.PREFIX_REUSE_ADOPT,
    "off": generation_pb2.PREFIX_REUSE_OFF,
}


class ChatMessage(TypedDict):
    """One turn of a conversation."""

    role: str
    """Who speaks: "system", "user", "assistant", or what else the model's template knows."""
    content: str
    """What is said."""


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of `stream` and `generate`, beside prompt and timeout."""

    token_ids: Sequence[int] | None
    """The prompt as token ids, in place of text."""
    messages: Sequence[ChatMessage] | None
    """The prompt as a conversation, for the model's own chat template, in place of text."""
    max_tokens: int | None
    """Most tokens to generate; None is the service's default (256)."""
    temperature: float | None
    """Softmax temperature; None or 0 is greedy."""
    top_p: float | None
    """Nucleus mass in (0, 1]."""
    top_k: int | None
    """Keep the k most likely tokens; 0 or -1 is off."""
    min_p: float | None
    """Drop tokens less likely than this fraction of the most likely one, in [0, 1]; 0 is off."""
    repetition_penalty: float | None
    """Makes tokens of prompt and output less likely above 1, more likely below, in [0.01, 100]."""
    presence_penalty: float | None
    """Taken from the logits of tokens that the output has, in [-2, 2]."""
    frequency_penalty: float | None
    """The same for each time that the output has them, in [-2, 2]."""
    logit_bias: Mapping[int, float]
    """Added to the logits of these token ids, each in [-100, 100]."""
    seed: int | None
    """Seed of the random numbers; drawn by the service when None."""
    first_choice: int
    """With n=1, draws the tokens of this choice of a request for more than that many."""
    n: int | None
    """Answers to draw, 1 to 32."""
    logprobs: int | None
    """Log probabilities of each token and of so many most likely ones, 0 to 20; None is none at all."""
    stop: Sequence[str]
    """Texts that end a choice and are no part of it, at most 16."""
    stop_token_ids: Sequence[int]
    """Token ids that end a choice."""
    min_tokens: int | None
    """Least tokens before end token, stop tokens and stop strings count."""
    ignore_eos: bool
    """Do not stop at the model's end token."""
    model: str
    """Model name; empty is the only one of the deployment."""
    attention_profile: str
    """How the prompt is attended: "exact", "paper" or "default"; empty is the deployment's own choice."""
    priority: int
    """How urgent it is, -10 to 10: each step is as good as having come 10 s earlier; 0 is normal."""
    prefix_reuse: str
    """Which KV of earlier prompts that began alike it may begin with: "exact", "adopt" or "off"; empty: "adopt" where
    the prompt is attended sparsely, else "exact"."""
    request_id: str | None
    """Name of the request, 1 to 64 printable ASCII characters; drawn when None."""


def stream_request(
    prompt: str | None, **options: Unpack[GenerationOptions]
) -> inference_service_pb2.StreamGenerateTextRequest:
    """The request of a generation.

    Id and nonce are drawn now, so that a retry after a lost connection repeats them and supersedes its own
    earlier try instead of clashing with it.

    Raises:
        ValueError: not exactly one of prompt, token_ids and messages, or a value that the wire cannot carry.
        TypeError: an unknown option, or a value of a wrong type; `stop` is a list, also of one string.
    """
    unknown = options.keys() - GenerationOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    token_ids, messages = options.get("token_ids"), options.get("messages")
    if [prompt, token_ids, messages].count(None) != 2:
        raise ValueError("give exactly one of prompt, token_ids and messages")
    if isinstance(
        options.get("stop"), str
    ):  # it is a sequence of strings, too, but not the one that is meant
        raise TypeError("stop is a list of strings, not one string")
    spec = generation_pb2.GenerationSpec(
        request_id=options.get("request_id") or f"req-{uuid.uuid4().hex}",
        nonce=secrets.token_bytes(NONCE_BYTES),
        model=options.get("model", ""),
        sampling=generation_pb2.SamplingSpec(
            temperature=options.get("temperature"),
            top_p=options.get("top_p"),
            top_k=options.get("top_k"),
            min_p=options.get("min_p"),
            repetition_penalty=options.get("repetition_penalty"),
            presence_penalty=options.get("presence_penalty"),
            frequency_penalty=options.get("frequency_penalty"),
            logit_bias=options.get("logit_bias", {}),
            seed=options.get("seed"),
            first_choice=options.get("first_choice", 0),
        ),
        stop=generation_pb2.StopSpec(
            max_tokens=options.get("max_tokens"),
            stop_token_ids=options.get("stop_token_ids", ()),
            ignore_eos=options.get("ignore_eos", False),
            stop_strings=options.get("stop", ()),
            min_tokens=options.get("min_tokens"),
        ),
        num_logprobs=options.get("logprobs"),
        num_choices=options.get("n"),
        attention_profile=options.get("attention_profile", ""),
        priority=options.get("priority", 0),
        prefix_reuse=_prefix_reuse(options.get("prefix_reuse", "")),
    )
    if prompt is not None:
        spec.text = prompt
    elif messages is not None:
        spec.chat.CopyFrom(chat_messages(messages))
    else:
        spec.token_ids.ids.extend(token_ids or ())
        spec.token_ids.SetInParent()  # an empty list is the service's to refuse
    return inference_service_pb2.StreamGenerateTextRequest(spec=spec)


def _prefix_reuse(name: str) -> "generation_pb2.PrefixReuse.ValueType":
    if name not in PREFIX_REUSES:
        raise ValueError(f"prefix_reuse is exact, adopt or off, not {name!r}")
    return PREFIX_REUSES[name]


def chat_messages(messages: Sequence[ChatMessage]) -> generation_pb2.ChatMessages:
    """A conversation as the wire has it.

    Raises:
        TypeError: a message has not exactly `role` and `content`, or they are no strings.
    """
    for message in messages:
        if set(message) != {"role", "content"}:
            raise TypeError("a message is a dictionary of role and content")
    turns = (generation_pb2.ChatMessage(role=one["role"], content=one["content"]) for one in messages)
    return generation_pb2.ChatMessages(messages=turns)


def tokenize_request(
    text: str | None, messages: Sequence[ChatMessage] | None, model: str
) -> tokenizer_service_pb2.TokenizeTextRequest:
    """The request of `tokenize`.

    Raises:
        ValueError: neither or both of text and messages.
    """
    if (text is None) == (messages is None):
        raise ValueError("give exactly one of text and messages")
    chat = None if messages is None else chat_messages(messages)
    return tokenizer_service_pb2.TokenizeTextRequest(model=model, text=text or "", chat=chat)
