"""How the tokens of a request are chosen and when it ends, read from the wire; shared by both workers."""

from sps2.internal.v1 import prefill_service_pb2
from sps2.v1 import generation_pb2
from sps2_engine.sampler import SamplingParams


def sampling_params(choice: prefill_service_pb2.TokenChoice) -> SamplingParams:
    """The sampler's parameters; the router has set every field and checked its range."""
    sampling = choice.sampling
    return SamplingParams(sampling.temperature, sampling.top_p, max(0, sampling.top_k), sampling.seed)


def finish_reason(
    choice: prefill_service_pb2.TokenChoice, token_id: int, num_output_tokens: int
) -> "generation_pb2.FinishReason.ValueType":
    """Whether a request ends with this token, its `num_output_tokens`-th; UNSPECIFIED when it goes on."""
    if token_id in choice.stop_token_ids:
        return generation_pb2.FINISH_REASON_STOP
    if num_output_tokens >= choice.max_tokens:
        return generation_pb2.FINISH_REASON_LENGTH
    return generation_pb2.FINISH_REASON_UNSPECIFIED
