"""What a GenerationSpec must be, field by field. Pure: no clock, no tokenizer, no state.

Two steps, because tokenizing lies between them: `check_fields` looks at everything that needs no prompt ids
and is cheap; `resolve` looks at the ids and fills in what was left unset. Messages say what to send instead.
"""

from collections.abc import Mapping, Sequence

from sps2.v1 import generation_pb2
from sps2_layout.attention import Attention
from sps2_layout.profiles import NAMED, Ladder
from sps2_router.choice_validation import check_choice, resolve_choice
from sps2_router.types import Request, Reuse, ServedModel
from sps2_service.errors import FieldViolation, InvalidArgument, NotFound, OutOfRange
from sps2_service.turns import MAX_PRIORITY

MAX_REQUEST_ID_CHARS = 64
MAX_NONCE_BYTES = 32
MAX_CHAT_MESSAGES = 1024
MAX_ROLE_CHARS = 64
DEFAULT_MAX_TOKENS = 256
REUSES: "Mapping[generation_pb2.PrefixReuse.ValueType, Reuse]" = {
    generation_pb2.PREFIX_REUSE_UNSPECIFIED: Reuse.ADOPT,  # which is as good as EXACT for a prompt that is exact
    generation_pb2.PREFIX_REUSE_EXACT: Reuse.EXACT,
    generation_pb2.PREFIX_REUSE_ADOPT: Reuse.ADOPT,
    generation_pb2.PREFIX_REUSE_OFF: Reuse.OFF,
}


def check_fields(spec: generation_pb2.GenerationSpec, model: ServedModel) -> None:
    """Everything about a spec that needs no tokenizing.

    Raises:
        NotFound: the model is not served.
        InvalidArgument: a field is wrong; names it.
        OutOfRange: more token ids than the context takes.
    """
    check_request_id(spec.request_id, "spec.request_id", may_be_empty=True)
    if len(spec.nonce) > MAX_NONCE_BYTES:
        raise InvalidArgument.of_field(
            "spec.nonce", f"is {len(spec.nonce)} bytes long; use at most {MAX_NONCE_BYTES}"
        )
    check_model(spec.model, model)
    _check_prompt(spec, model)
    if abs(spec.priority) > MAX_PRIORITY:
        raise InvalidArgument.of_field(
            "spec.priority", f"is {spec.priority}; send {-MAX_PRIORITY} to {MAX_PRIORITY}"
        )
    check_choice(spec, model)
    check_token_ids(spec.stop.stop_token_ids, "spec.stop.stop_token_ids", model)
    if spec.prefix_reuse not in REUSES:
        raise InvalidArgument.of_field(
            "spec.prefix_reuse", f"is {spec.prefix_reuse}; send 0 to {max(REUSES)}, see PrefixReuse"
        )
    if spec.attention_profile and spec.attention_profile not in NAMED:
        shown = spec.attention_profile[:64].encode("ascii", "replace").decode()
        raise InvalidArgument.of_field(
            "spec.attention_profile",
            f"{shown!r} is unknown; send one of {', '.join(NAMED)}, or nothing for the deployment's own",
        )


def check_request_id(request_id: str, field: str, *, may_be_empty: bool = False) -> None:
    """Ids are 1 to 64 printable ASCII characters; raises InvalidArgument naming `field`."""
    if not request_id and not may_be_empty:
        raise InvalidArgument.of_field(field, "is empty; name the request")
    if len(request_id) > MAX_REQUEST_ID_CHARS:
        raise InvalidArgument.of_field(
            field, f"is {len(request_id)} characters long; use at most {MAX_REQUEST_ID_CHARS}"
        )
    if not (request_id.isascii() and (request_id.isprintable() or not request_id)):
        raise InvalidArgument.of_field(field, "holds control or non-ASCII characters; use printable ASCII")


def check_model(name: str, model: ServedModel) -> None:
    """Raises NotFound unless `name` is empty or the served model's."""
    if name and name != model.name:
        shown = name[:64].encode("ascii", "replace").decode()
        raise NotFound(
            "MODEL_NOT_FOUND",
            f"model {shown!r} is not served here; leave spec.model empty or set it to {model.name!r}",
            metadata={"model": model.name},
        )


def _check_prompt(spec: generation_pb2.GenerationSpec, model: ServedModel) -> None:
    match spec.WhichOneof("prompt"):
        case "text":
            if not spec.text:
                raise InvalidArgument.of_field("spec.text", "is empty; send at least one character")
        case "chat":
            check_chat(spec.chat, "spec.chat")
        case "token_ids":
            ids = spec.token_ids.ids
            if not ids:
                raise InvalidArgument.of_field("spec.token_ids.ids", "is empty; send at least one token id")
            _check_room(len(ids), model)  # before millions of them are looked at
            check_token_ids(ids, "spec.token_ids.ids", model)
        case _:
            raise InvalidArgument.of_field("spec.prompt", "is missing; set one of text, token_ids and chat")


def check_token_ids(ids: Sequence[int], field: str, model: ServedModel) -> None:
    """Raises InvalidArgument that names the first id outside of the vocabulary, as `field[index]`."""
    if ids and (min(ids) < 0 or max(ids) >= model.vocabulary_size):  # two passes in C, no loop in Python
        index = next(i for i, one in enumerate(ids) if not 0 <= one < model.vocabulary_size)
        raise InvalidArgument.of_field(
            f"{field}[{index}]",
            f"is {ids[index]}; {model.name!r} has token ids from 0 to {model.vocabulary_size - 1}",
        )


def check_chat(chat: generation_pb2.ChatMessages, field: str) -> None:
    """Raises InvalidArgument unless there are messages with roles, and no template of the caller's."""
    if chat.chat_template:
        raise InvalidArgument.of_field(
            f"{field}.chat_template", "is set; only the model's own template is run: leave it empty"
        )
    if not 1 <= len(chat.messages) <= MAX_CHAT_MESSAGES:
        raise InvalidArgument.of_field(
            f"{field}.messages", f"has {len(chat.messages)} messages; send 1 to {MAX_CHAT_MESSAGES}"
        )
    for index, message in enumerate(chat.messages):
        role = message.role
        if not (0 < len(role) <= MAX_ROLE_CHARS and role.isascii() and role.isprintable()):
            raise InvalidArgument.of_field(
                f"{field}.messages[{index}].role",
                f"must be 1 to {MAX_ROLE_CHARS} printable ASCII characters, such as user or assistant",
            )


def check_text_length(num_chars: int, longest_token: int, model: ServedModel, field: str) -> None:
    """Refuses what cannot fit the context before time and memory are spent on tokenizing it.

    Raises:
        OutOfRange: more characters than `context_length` tokens of `longest_token` characters have.
    """
    limit = model.context_length * longest_token
    if num_chars > limit:
        raise _too_long(
            field,
            f"is {num_chars} characters long; no text of more than {limit} fits the context of "
            f"{model.context_length} tokens: shorten it",
            model.context_length,
        )


def resolve(
    spec: generation_pb2.GenerationSpec,
    request_id: str,
    prompt_ids: Sequence[int],
    model: ServedModel,
    drawn_seed: int,
    ladder: Ladder,
) -> Request:
    """The request that a checked spec asks for, with every default filled in.

    Args:
        spec: Passed `check_fields`.
        request_id: The spec's own, or a drawn one.
        prompt_ids: The spec's ids, or those of its text.
        model: The served model.
        drawn_seed: Used when the spec has none.
        ladder: The deployment's attention profile, used when the spec names none.

    Raises:
        OutOfRange: prompt and max_tokens together are longer than the context.
        InvalidArgument: the text has no tokens, or min_tokens is above max_tokens.
    """
    if not prompt_ids:
        raise InvalidArgument.of_field("spec.prompt", "has no tokens; send text that is not empty")
    max_tokens = _fit(spec.stop, len(prompt_ids), model)
    choice = resolve_choice(spec, model, max_tokens, drawn_seed)
    chosen = NAMED[spec.attention_profile] if spec.attention_profile else ladder
    attention = Attention.admit(chosen, len(prompt_ids))
    return Request(
        request_id,
        prompt_ids,
        choice,
        attention,
        _describe(chosen, attention),
        priority=spec.priority,
        reuse=REUSES[spec.prefix_reuse],
    )


def _describe(ladder: Ladder, attention: Attention) -> str:
    """What usage says: a dense prompt is "exact", whichever profile left it dense."""
    mask = attention.describe()
    return mask if attention.layout is None else f"{ladder.name}: {mask}"


def _fit(stop: generation_pb2.StopSpec, num_prompt_tokens: int, model: ServedModel) -> int:
    """The number of tokens to generate at most."""
    context_length = model.context_length
    room = _check_room(num_prompt_tokens, model)
    if not stop.HasField("max_tokens"):
        return min(DEFAULT_MAX_TOKENS, room)
    if stop.max_tokens > room:
        raise _too_long(
            "spec.stop.max_tokens",
            f"is {stop.max_tokens}; after a prompt of {num_prompt_tokens} tokens the context of "
            f"{context_length} has room for {room}: ask for fewer or shorten the prompt",
            context_length,
        )
    return stop.max_tokens


def _check_room(num_prompt_tokens: int, model: ServedModel) -> int:
    """Tokens that the context has left for the answer, at least one."""
    context_length = model.context_length
    if num_prompt_tokens >= context_length:
        raise _too_long(
            "spec.prompt",
            f"has {num_prompt_tokens} tokens; the context of {context_length} takes at most "
            f"{context_length - 1} and one of output: shorten it",
            context_length,
        )
    return context_length - num_prompt_tokens


def _too_long(field: str, description: str, context_length: int) -> OutOfRange:
    return OutOfRange(
        "CONTEXT_LENGTH_EXCEEDED",
        f"{field}: {description}",
        violations=[FieldViolation(field, description)],
        metadata={"context_length": str(context_length)},
    )
