"""TokenizerService on the wire."""

from typing import Any

import grpc

from sps2.v1 import tokenizer_service_pb2 as pb
from sps2_router.tokenizer import ModelTokenizer
from sps2_router.types import ServedModel
from sps2_router.validation import check_model, check_text_length, check_token_ids
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
        if not request.text:
            raise InvalidArgument.of_field("text", "is empty; send at least one character")
        check_text_length(request.text, self._tokenizer.longest_token, self._model, "text")
        return pb.TokenizeTextResponse(token_ids=await self._tokenizer.encode(request.text))

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
        check_token_ids(request.token_ids, "token_ids", self._model)
        return pb.DetokenizeTokensResponse(text=await self._tokenizer.decode_all(list(request.token_ids)))
