"""Messages of a conversation to the text of a prompt, by the model's own chat template.

transformers reads the template and renders it in its Jinja sandbox; nothing of a request is ever a template. The
library is imported only for a model that has one, as that takes a second.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sps2.v1 import generation_pb2
from sps2_service.errors import FailedPrecondition, InvalidArgument

MAX_REASON_CHARS = 160


class ChatTemplateError(ValueError):
    """The model folder's template cannot be read."""


class ChatTemplate:
    """The template of one model, if it has any."""

    def __init__(self, tokenizer: Any | None) -> None:
        """`tokenizer` is transformers' tokenizer of a model that has a template; None: it has none."""
        self._tokenizer = tokenizer

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTemplate":
        """That of a model folder: chat_template.jinja, or `chat_template` of tokenizer_config.json.

        Raises:
            ChatTemplateError: one is there and cannot be used.
        """
        if not _has_template(folder):
            return cls(None)
        from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - see above

        try:
            return cls(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))
        except (OSError, ValueError, TypeError) as error:
            raise ChatTemplateError(f"{folder}: the chat template cannot be read: {error}") from error

    def render(self, messages: Sequence[generation_pb2.ChatMessage], field: str) -> str:
        """The prompt that ends where the model's answer begins.

        Args:
            messages: As they came; at least one.
            field: Their name in the request, for errors.

        Raises:
            FailedPrecondition: the model has no chat template.
            InvalidArgument: the template does not take these messages.
        """
        if self._tokenizer is None:
            raise FailedPrecondition(
                "NO_CHAT_TEMPLATE",
                "the served model has no chat template; send the prompt as text or token ids",
            )
        turns = [{"role": one.role, "content": one.content} for one in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template runs into, it is these messages that led it there
            why = str(error)[:MAX_REASON_CHARS] or type(error).__name__
            raise InvalidArgument.of_field(
                field, f"are not what the model's chat template takes: {why}", "CHAT_TEMPLATE_REFUSED"
            ) from error
        return text


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return False
    try:
        config: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise ChatTemplateError(f"{path}: not JSON: {error}") from error
    return isinstance(config, dict) and bool(config.get("chat_template"))
