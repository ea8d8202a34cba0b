"""The served model's tokenizer, off the event loop.

Threads of a small pool keep a long prompt from stopping the token path, which only works with those calls of
`tokenizers` that release the GIL: the batch ones (`encode` held it for all of 2.2 s on 1 MB of text, and is
three times slower than `encode_batch_fast`, which keeps no offsets). transformers is used for chat templates alone.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from sps2.v1 import generation_pb2
from sps2_router.chat_template import ChatTemplate

DEFAULT_THREADS = 2


class TokenizerAbsentError(OSError):
    """The model folder has no readable tokenizer.json."""


class ModelTokenizer:
    """Encodes prompts and decodes answers. Close it at the end."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_threads: int = DEFAULT_THREADS,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        """`num_threads`: prompts that are tokenized at once; more wait their turn."""
        self._tokenizer = tokenizer
        self._chat_template = chat_template or ChatTemplate(None)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.longest_token = max(map(len, tokenizer.get_vocab()))
        """Characters of the vocabulary's longest entry: N tokens are at most N times as many characters."""

    @classmethod
    def from_folder(cls, folder: Path, num_threads: int = DEFAULT_THREADS) -> "ModelTokenizer":
        """Reads `tokenizer.json` of a model folder, and its chat template if it has one.

        Raises:
            TokenizerAbsentError: the file is missing or no tokenizer.
            ChatTemplateError: the template cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerAbsentError(f"{path} is missing: the router needs the model's fast tokenizer")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception for everything
            raise TokenizerAbsentError(f"{path} is no tokenizer: {error}") from error
        return cls(tokenizer, num_threads, ChatTemplate.from_folder(folder))

    async def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer's config adds."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._encode, text)

    def _encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[
            0
        ].ids
        return ids

    async def render_chat(self, messages: Sequence[generation_pb2.ChatMessage], field: str) -> str:
        """See `ChatTemplate.render`; off the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._chat_template.render, messages, field)

    async def encode_rendered(self, text: str) -> list[int]:
        """Token ids of what a chat template made: it has the special tokens in its text, and no others are added."""
        encode = partial(self._encode, text, add_special_tokens=False)
        return await asyncio.get_running_loop().run_in_executor(self._pool, encode)

    async def decode_all(self, token_ids: list[int]) -> str:
        """Text of many ids, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._decode_all, token_ids)

    def _decode_all(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode_batch([token_ids], skip_special_tokens=True)[0]
        return text

    def decode(self, token_ids: list[int]) -> str:
        """Text of a few ids, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def close(self) -> None:
        """Ends the threads; what is being tokenized finishes, what waits is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
