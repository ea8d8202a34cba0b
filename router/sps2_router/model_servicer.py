"""ModelService on the wire."""

from typing import Any

import grpc

from sps2.v1 import model_service_pb2 as pb
from sps2_router.types import ServedModel
from sps2_router.validation import check_model
from sps2_service.errors import InvalidArgument

Context = grpc.aio.ServicerContext[Any, Any]


class ModelServicer:
    """Serves sps2.v1.ModelService for the one model."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    async def ListModels(self, _: pb.ListModelsRequest, __: Context) -> pb.ListModelsResponse:  # noqa: N802
        """See model_service.proto."""
        return pb.ListModelsResponse(models=[pack_model(self._model)])

    async def GetModel(self, request: pb.GetModelRequest, _: Context) -> pb.GetModelResponse:  # noqa: N802
        """See model_service.proto."""
        if not request.name:
            raise InvalidArgument.of_field("name", "is empty; send a name that ListModels returns")
        check_model(request.name, self._model)
        return pb.GetModelResponse(model=pack_model(self._model))


def pack_model(model: ServedModel) -> pb.Model:
    """The model as the wire has it."""
    return pb.Model(
        name=model.name,
        model_hash=model.model_hash,
        context_length=model.context_length,
        vocabulary_size=model.vocabulary_size,
        eos_token_ids=model.eos_token_ids,
    )
