"""TokenizerService on the wire."""

from typing import Any

import grpc

from sps2.v1 import tokenizer_service_pb2 as pb
from sps2_router.prompt_ids import ids_of_chat, ids_of_text
from sps2_router.tokenizer import ModelTokenizer
from sps2_router.types import ServedModel
from sps2_router.validation import check_model
from sps2_service.errors import InvalidArgument

Context = grpc.aio.ServicerContext[Any, Any]


class TokenizerServicer:
    """Serves sps2.v1.TokenizerService with the served model's tokenizer."""

    def __init__(self, model: ServedModel, tokenizer: ModelTokenizer) -> None:
        self._model = model
        self._tokenizer = tokenizer

    async def TokenizeText(self, request: pb.TokenizeTextRequest, _: Context) -> pb.TokenizeTextResponse:  # noqa: N802
        """See tokenizer_service.proto."""
        check_model(request.model, self._model)
        if request.text and request.HasField("chat"):
            raise InvalidArgument.of_field("chat", "is set and text too; send one of them")
        if request.HasField("chat"):
            ids = await ids_of_chat(request.chat, self._tokenizer, self._model, "chat")
        else:
            ids = await ids_of_text(request.text, self._tokenizer, self._model, "text")
        return pb.TokenizeTextResponse(token_ids=ids)

    async def DetokenizeTokens(  # noqa: N802
        self, request: pb.DetokenizeTokensRequest, _: Context
    ) -> pb.DetokenizeTokensResponse:
        """See tokenizer_service.proto."""
        check_model(request.model, self._model)
        limit = self._model.context_length
        if len(request.token_ids) > limit:
            raise InvalidArgument.of_field(
                "token_ids", f"has {len(request.token_ids)} ids; send at most {limit}"
            )
        self._model.vocabulary.check("token_ids", request.token_ids)
        return pb.DetokenizeTokensResponse(text=await self._tokenizer.decode_all(list(request.token_ids)))
