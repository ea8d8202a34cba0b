"""Text or chat messages to the token ids of a prompt, with the checks that come before and between."""

from sps2.v1 import generation_pb2
from sps2_router.tokenizer import ModelTokenizer
from sps2_router.types import ServedModel
from sps2_router.validation import check_chat, check_text_length
from sps2_service.errors import InvalidArgument


def least_tokens(spec: generation_pb2.GenerationSpec, longest_token: int) -> int:
    """Fewest tokens that a prompt can have, in whatever form it comes; `longest_token` in characters."""
    if spec.WhichOneof("prompt") == "token_ids":
        return max(1, len(spec.token_ids.ids))
    num_chars = len(spec.text) + sum(len(one.content) for one in spec.chat.messages)
    return max(1, -(-num_chars // longest_token))


async def ids_of_text(text: str, tokenizer: ModelTokenizer, model: ServedModel, field: str) -> list[int]:
    """Token ids of a text, with the special tokens that a prompt gets.

    Raises:
        InvalidArgument: it is empty; names `field`.
        OutOfRange: it cannot fit the context.
    """
    if not text:
        raise InvalidArgument.of_field(field, "is empty; send at least one character")
    check_text_length(len(text), tokenizer.longest_token, model, field)
    return await tokenizer.encode(text)


async def ids_of_chat(
    chat: generation_pb2.ChatMessages, tokenizer: ModelTokenizer, model: ServedModel, field: str
) -> list[int]:
    """Token ids of a conversation, by the model's own template.

    Raises:
        InvalidArgument: a message is wrong, or the template refuses them; names a field within `field`.
        FailedPrecondition: the model has no chat template.
        OutOfRange: they cannot fit the context.
    """
    check_chat(chat, field)
    messages = f"{field}.messages"
    # Before a template is run over them, and again for what it adds.
    check_text_length(
        sum(len(one.content) for one in chat.messages), tokenizer.longest_token, model, messages
    )
    text = await tokenizer.render_chat(chat.messages, messages)
    check_text_length(len(text), tokenizer.longest_token, model, messages)
    return await tokenizer.encode_rendered(text)
