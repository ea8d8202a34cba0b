"""Messages of the wire to the SDK's dataclasses. Pure."""

from sps2.v1 import (
    cluster_pb2,
    cluster_service_pb2,
    generation_pb2,
    inference_service_pb2,
    model_service_pb2,
)
from sps2_client._types import (
    BytesMoved,
    ClusterChange,
    ClusterState,
    FinishReason,
    Model,
    Progress,
    Resized,
    Timings,
    TokenLogprob,
    Usage,
    Worker,
)

FINISH_REASONS: dict[int, FinishReason] = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}

ROLES: dict[int, str] = {
    cluster_pb2.WORKER_ROLE_PREFILL: "prefill",
    cluster_pb2.WORKER_ROLE_DECODE: "decode",
}

STATES: dict[int, str] = {
    cluster_pb2.WORKER_STATE_STARTING: "starting",
    cluster_pb2.WORKER_STATE_READY: "ready",
    cluster_pb2.WORKER_STATE_DRAINING: "draining",
}

PHASES: dict[int, str] = {
    number: name.removeprefix("GENERATION_PHASE_").lower()
    for name, number in inference_service_pb2.GenerationPhase.items()
}


def usage(message: generation_pb2.Usage) -> Usage:
    """Totals of a request."""
    timings, moved = message.timings, message.bytes
    return Usage(
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        output_tokens=message.output_tokens,
        timings=Timings(
            queue=timings.queue,
            prefill=timings.prefill,
            transfer=timings.transfer,
            ttft=timings.ttft,
            tpot=timings.tpot,
            e2e=timings.e2e,
            tbt_p50=timings.tbt_p50,
            tbt_p99=timings.tbt_p99,
        ),
        bytes_moved=BytesMoved(
            collective=moved.collective, q_exchange=moved.q_exchange, kv_transfer=moved.kv_transfer
        ),
        attention_profile=message.attention_profile,
    )


def logprob(message: generation_pb2.TokenLogprob) -> TokenLogprob:
    """How likely a token was."""
    top = zip(message.top_token_ids, message.top_logprobs, strict=True)
    return TokenLogprob(message.logprob, tuple(top))


def model(message: model_service_pb2.Model) -> Model:
    """A served model."""
    return Model(
        name=message.name,
        model_hash=message.model_hash,
        context_length=message.context_length,
        vocabulary_size=message.vocabulary_size,
        eos_token_ids=tuple(message.eos_token_ids),
    )


def worker(message: cluster_pb2.WorkerInfo) -> Worker:
    """One rank; a role or state newer than this SDK is "unspecified"."""
    able, load = message.capabilities, message.load
    return Worker(
        worker_id=message.worker_id,
        role=ROLES.get(message.role, "unspecified"),
        group=message.group,
        rank=message.rank,
        group_size=message.group_size,
        epoch=message.epoch,
        state=STATES.get(message.state, "unspecified"),
        grpc_address=message.grpc_address,
        model_name=able.model_name,
        dtype=able.dtype,
        device=able.device,
        tensor_ranks=max(1, able.tensor_ranks),
        kv_blocks_total=able.kv_blocks_total,
        kv_blocks_used=load.kv_blocks_used,
        kv_blocks_cached=load.kv_blocks_cached,
        prompt_tokens=load.prompt_tokens,
        cached_tokens=load.cached_tokens,
        num_requests_running=load.num_requests_running,
        num_requests_waiting=load.num_requests_waiting,
        queued_tokens=load.queued_tokens,
        steps_done=load.steps_done,
        control_share=load.control_share,
        load_fraction=load.load_fraction,
        bytes_posted=dict(load.bytes_posted),
        num_resizes=load.num_resizes,
        num_blocks_moved=load.num_blocks_moved,
    )


def resized(message: cluster_service_pb2.ResizeRequestResponse) -> Resized:
    """What a resize has done."""
    return Resized(
        group=message.group,
        home=message.home,
        holders=tuple(message.holders),
        num_blocks_moved=message.num_blocks_moved,
        longest_gap_s=message.longest_gap_s,
        median_gap_s=message.median_gap_s,
    )


def cluster_state(message: cluster_service_pb2.GetClusterStateResponse) -> ClusterState:
    """The router's view of the cluster."""
    return ClusterState(
        workers=tuple(worker(one) for one in message.workers),
        directory_connected=message.directory_connected,
        num_requests_live=message.num_requests_live,
        num_requests_by_group=dict(message.num_requests_by_group),
        num_queued_tokens=message.num_queued_tokens,
    )


def progress(message: inference_service_pb2.WatchGenerationResponse) -> Progress:
    """How far a request is."""
    return Progress(
        phase=PHASES.get(message.phase, "unspecified"),
        queue_position=message.queue_position,
        prefill_fraction=message.prefill_fraction,
        num_tokens=message.num_tokens,
        attempt=message.attempt,
    )


def cluster_change(message: cluster_service_pb2.WatchClusterStateResponse) -> ClusterChange:
    """What has changed of the cluster."""
    return ClusterChange(
        revision=message.revision,
        snapshot=message.snapshot,
        updated=tuple(worker(one) for one in message.updated),
        removed=tuple(message.removed_worker_ids),
        directory_connected=message.directory_connected,
        num_requests_live=message.num_requests_live,
    )
