"""The JSON documents that commands print, and the lines for people. Pure: their shapes are a contract."""

from typing import Any

from sps2_client import BytesMoved, Choice, ClusterState, Generation, Timings, Usage, Worker


def generation_document(answer: Generation) -> dict[str, Any]:
    """The document of `sps2 generate --json`."""
    usage, (first, *more) = answer.usage, answer.choices
    return {
        **choice_document(first),
        "more_choices": [choice_document(choice) for choice in more],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "output_tokens": usage.output_tokens,
        },
        "timings_s": timings_document(usage.timings),
        "bytes": bytes_document(usage.bytes_moved),
        "attention_profile": usage.attention_profile,
        "request_id": answer.request_id,
    }


def choice_document(choice: Choice) -> dict[str, Any]:
    """One answer; `logprobs` is empty unless they were asked for."""
    return {
        "text": choice.text,
        "token_ids": list(choice.token_ids),
        "finish_reason": choice.finish_reason,
        "logprobs": [
            {"logprob": one.logprob, "top": [list(pair) for pair in one.top]} for one in choice.logprobs
        ],
    }


def timings_document(timings: Timings) -> dict[str, float]:
    """Seconds by phase."""
    return {
        "queue": timings.queue,
        "prefill": timings.prefill,
        "transfer": timings.transfer,
        "ttft": timings.ttft,
        "tpot": timings.tpot,
        "e2e": timings.e2e,
        "tbt_p50": timings.tbt_p50,
        "tbt_p99": timings.tbt_p99,
    }


def bytes_document(moved: BytesMoved) -> dict[str, int]:
    """Bytes by plane."""
    return {
        "collective": moved.collective,
        "q_exchange": moved.q_exchange,
        "kv_transfer": moved.kv_transfer,
    }


def usage_line(usage: Usage) -> str:
    """One line on what a request took."""
    timings = usage.timings
    return (
        f"{usage.prompt_tokens:,} prompt tokens ({usage.cached_tokens:,} cached), "
        f"{usage.output_tokens:,} tokens out; ttft {duration(timings.ttft)} "
        f"(queue {duration(timings.queue)}, prefill {duration(timings.prefill)}, "
        f"transfer {duration(timings.transfer)}), tpot {duration(timings.tpot)}, "
        f"e2e {duration(timings.e2e)}; "
        f"{bytes_line(usage.bytes_moved)}"
    )


def bytes_line(moved: BytesMoved) -> str:
    """Bytes by plane for people."""
    return (
        f"moved: head exchange {size(moved.collective)}, Q exchange {size(moved.q_exchange)}, "
        f"KV transfer {size(moved.kv_transfer)}"
    )


def duration(seconds: float) -> str:
    """Seconds for people, as in "1.23 s"."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def size(count: float) -> str:
    """Bytes for people, as in "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def status_document(address: str, state: ClusterState) -> dict[str, Any]:
    """The document of `sps2 status --json`: pools of groups of ranks."""
    pools: dict[str, dict[str, list[dict[str, Any]]]] = {"prefill": {}, "decode": {}}
    for worker in state.workers:
        pools.setdefault(worker.role, {}).setdefault(worker.group, []).append(worker_document(worker))
    return {
        "address": address,
        "directory_connected": state.directory_connected,
        "num_requests_live": state.num_requests_live,
        "num_queued_tokens": state.num_queued_tokens,
        "pools": {
            role: [
                {
                    "group": group,
                    "num_requests_live": state.num_requests_by_group.get(group, 0),
                    "ready": group_ready(ranks),
                    "state": group_state(ranks),
                    "ranks": ranks,
                }
                for group, ranks in sorted(groups.items())
            ]
            for role, groups in pools.items()
        },
    }


def group_ready(ranks: list[dict[str, Any]]) -> bool:
    """Whether all ranks of a group are there and ready."""
    return len(ranks) == ranks[0]["group_size"] and all(one["state"] == "ready" for one in ranks)


def group_state(ranks: list[dict[str, Any]]) -> str:
    """Of the group as a whole: ready, starting or draining."""
    if any(one["state"] == "draining" for one in ranks):
        return "draining"
    return "ready" if group_ready(ranks) else "starting"


def worker_document(worker: Worker) -> dict[str, Any]:
    """One rank."""
    return {
        "worker_id": worker.worker_id,
        "rank": worker.rank,
        "group_size": worker.group_size,
        "state": worker.state,
        "epoch": worker.epoch,
        "address": worker.grpc_address,
        "model": worker.model_name,
        "dtype": worker.dtype,
        "device": worker.device,
        "load_fraction": worker.load_fraction,
        "kv_blocks_used": worker.kv_blocks_used,
        "kv_blocks_cached": worker.kv_blocks_cached,
        "prompt_tokens": worker.prompt_tokens,
        "cached_tokens": worker.cached_tokens,
        "kv_blocks_total": worker.kv_blocks_total,
        "tensor_ranks": worker.tensor_ranks,
        "num_requests_running": worker.num_requests_running,
        "num_requests_waiting": worker.num_requests_waiting,
        "queued_tokens": worker.queued_tokens,
        "steps_done": worker.steps_done,
        "num_resizes": worker.num_resizes,
        "num_blocks_moved": worker.num_blocks_moved,
        "control_share": worker.control_share,
        "bytes_posted": dict(worker.bytes_posted),
    }
