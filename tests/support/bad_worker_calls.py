"""Bad input among workers: what leaders, and the engines that take KV, must refuse, sent to them raw."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc

from sps2.internal.v1 import decode_service_pb2, group_service_pb2, placement_pb2, prefill_service_pb2
from sps2.internal.v1.decode_service_pb2_grpc import DecodeServiceStub
from sps2.internal.v1.kv_transfer_service_pb2 import KvFormat, OpenRingRequest, PushSlabsRequest, SlabHeader
from sps2.v1 import generation_pb2
from sps2_client import Client, Model
from support.bad_calls import DECODE, TIMEOUT_S, BadCall, Code, check_calls
from support.streams import epochs

PREFILL = "/sps2.internal.v1.PrefillService/Prefill"
SEND_PREFIX = "/sps2.internal.v1.PrefillService/SendPrefix"
RESIZE = "/sps2.internal.v1.DecodeService/ResizeAttempt"
JOIN = "/sps2.internal.v1.GroupService/JoinGroup"
OPEN_RING = "/sps2.internal.v1.KvTransferService/OpenRing"
PUSH_SLABS = "/sps2.internal.v1.KvTransferService/PushSlabs"
SOURCE = (("sps2-source-incarnation", "a-source"),)
MOST = 2**31 - 1
LEAST = -(2**31)
NUM_TOKENS = 8
ATTEMPT = placement_pb2.Attempt(request_id="bad", number=1)
NOISE = b"\xff" * 24

Reserve = decode_service_pb2.ReserveKv
Prefill = prefill_service_pb2.PrefillRequest
Edit = Callable[[Any], object]


def check_worker_calls(client: Client, folder: Path) -> int:
    """All of them against a deployment of one group for each role; no epoch ends over them.

    Returns:
        How many calls were refused.
    """
    before, model = epochs(client), client.list_models()[0]
    leaders = {one.role: one.grpc_address for one in client.cluster_state().workers if one.rank == 0}
    count = check_calls(leaders["decode"], decode_calls(model) + group_calls(model))
    count += check_calls(leaders["prefill"], prefill_calls(model))
    count += check_calls(_transfer_address(leaders["decode"], model), transfer_calls(model, folder))
    assert epochs(client) == before, "a group formed anew"
    return count


def decode_calls(model: Model) -> list[BadCall]:
    """Rows for the leader of a decode group, as only the router may send them."""
    wrong: list[tuple[str, str, Edit]] = [
        ("attempt of none", "reserve.attempt.request_id", lambda r: r.ClearField("attempt")),
        ("attempt 0", "reserve.attempt.number", lambda r: setattr(r.attempt, "number", 0)),
        ("prompt of 0", "reserve.num_prompt_tokens", lambda r: setattr(r, "num_prompt_tokens", 0)),
        ("prompt below 0", "reserve.num_prompt_tokens", lambda r: setattr(r, "num_prompt_tokens", LEAST)),
        ("choices", "reserve.choice.num_choices", lambda r: setattr(r.choice, "num_choices", MOST)),
        ("max_tokens", "reserve.choice.max_tokens", lambda r: setattr(r.choice, "max_tokens", 0)),
        (
            "top_p NaN",
            "reserve.choice.sampling.top_p",
            lambda r: setattr(r.choice.sampling, "top_p", math.nan),
        ),
        ("priority", "reserve.priority", lambda r: setattr(r, "priority", MOST)),
    ]
    calls = [_refused(name, DECODE, field, _reserve(model, edit)) for name, field, edit in wrong]
    starts: list[tuple[str, dict[str, Any]]] = [
        ("start.first_token_id", {"first_token_id": MOST}),
        ("start.finished_choices[0]", {"finished_choices": [9]}),
    ]
    for field, fields in starts:
        start = decode_service_pb2.DecodeRequest(start=decode_service_pb2.StartDecode(**fields))
        calls.append(_refused(field, DECODE, field, _reserve(model), then=(start.SerializeToString(),)))
    other, much = _reserve(model, _set(model_hash="other")), _reserve(model, _set(num_prompt_tokens=MOST))
    too_large = BadCall(
        "more KV than there is", DECODE, much, Code.FAILED_PRECONDITION, reason="REQUEST_TOO_LARGE"
    )
    return [
        *_as_streams(calls),
        *_as_streams(
            [
                _malformed("a worker's noise", DECODE),
                BadCall("a model of others", DECODE, other, Code.FAILED_PRECONDITION),
                too_large,
            ]
        ),
        _refused("resize to 99 ranks", RESIZE, "degree", _resize(degree=99)),
        _refused("resize to rank 99", RESIZE, "ranks", _resize(degree=1, ranks=[99])),
        _refused("resize to rank -1", RESIZE, "ranks", _resize(degree=1, ranks=[-1])),
    ]


def group_calls(model: Model) -> list[BadCall]:
    """Rows for a leader by who says that he is of its group."""
    hello = {
        "group": "decode-0",
        "rank": 1,
        "group_size": 2,
        "process_incarnation": "x",
        "model_hash": model.model_hash,
        "tensor_ranks": 1,
    }
    wrong: list[tuple[str, object]] = [("rank", 7), ("rank", -1), ("group_size", MOST), ("tensor_ranks", 0)]
    calls = [
        BadCall(
            f"{name} {value}", JOIN, _hello(**hello | {name: value}), Code.INVALID_ARGUMENT, f"hello.{name}"
        )
        for name, value in wrong
    ]
    return _as_streams(
        [*calls, _malformed("a follower's noise", JOIN), _refused("no hello", JOIN, "hello", b"")]
    )


def prefill_calls(model: Model) -> list[BadCall]:
    """Rows for the leader of a prefill group."""
    shard = "placement.shards[0]"
    wrong: list[tuple[str, str, Edit]] = [
        ("rank -1", f"{shard}.rank", _shard(rank=-1)),
        ("rank of no group", f"{shard}.rank", _shard(rank=MOST)),
        ("tokens beyond the prompt", f"{shard}.token_begin", _shard(token_end=MOST)),
        ("tokens that overflow", f"{shard}.token_begin", _shard(token_begin=MOST, token_end=LEAST)),
        ("heads of none", "placement", _shard(head_begin=MOST, head_end=MOST)),
        ("no address", f"{shard}.transfer_address", _shard(transfer_address="")),
        ("another's fence", f"{shard}.fence.attempt", lambda r: r.placement.shards[0].ClearField("fence")),
        ("no placement", "placement", lambda r: r.ClearField("placement")),
        ("no mask", "attention", lambda r: r.ClearField("attention")),
        ("a billion shards", "attention", _billion_shards),
        ("token of none", "token_ids[3]", lambda r: r.token_ids.__setitem__(3, model.vocabulary_size)),
        ("token -1", "token_ids[3]", lambda r: r.token_ids.__setitem__(3, -1)),
        (
            "bias of none",
            f"choice.sampling.logit_bias[{MOST}]",
            lambda r: r.choice.sampling.logit_bias.update({MOST: 1.0}),
        ),
        ("logprobs", "choice.num_logprobs", lambda r: setattr(r.choice, "num_logprobs", MOST)),
    ]
    wrong += [
        ("half a block", "prefix_sources[0].num_tokens", _source(num_tokens=32)),
        ("a holder of nowhere", "prefix_sources[0].leader_address", _source(leader_address="")),
    ]
    calls = [_refused(name, PREFILL, field, _prefill(edit)) for name, field, edit in wrong]
    prefixes: list[tuple[str, str, Edit]] = [
        ("a prefix of no attempt", "attempt.request_id", lambda r: r.ClearField("attempt")),
        ("a prefix of no blocks", "block_hashes", lambda r: r.ClearField("block_hashes")),
        ("a prefix to rank -1", f"{shard}.rank", _shard(rank=-1)),
        ("a prefix to nowhere", f"{shard}.transfer_address", _shard(transfer_address="")),
        ("more than the prefix", f"{shard}.token_begin", _shard(token_end=MOST)),
        ("heads of none", "placement", _shard(head_begin=MOST, head_end=MOST)),
        ("a part of the prefix", "placement", _shard(token_end=NUM_TOKENS)),
        ("a prefix of no mask", "attention", lambda r: r.ClearField("attention")),
    ]
    calls += [_refused(name, SEND_PREFIX, field, _send_prefix(edit)) for name, field, edit in prefixes]
    unknown = _send_prefix(lambda _: None)
    return [
        *calls,
        BadCall("a prefix of nobody", SEND_PREFIX, unknown, Code.NOT_FOUND, reason="PREFIX_NOT_CACHED"),
        _malformed("a prompt of noise", PREFILL),
        _malformed("a prefix of noise", SEND_PREFIX),
    ]


def transfer_calls(model: Model, folder: Path) -> list[BadCall]:
    """Rows for an engine that takes KV: formats, and slabs that no placement could take."""
    config = json.loads((folder / "config.json").read_text())
    ours = {
        "model_hash": model.model_hash,
        "dtype": "fp32",
        "layout_version": 1,
        "num_layers": config["num_hidden_layers"],
        "num_kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
    }
    formats: list[tuple[str, object]] = [
        ("dtype", "int3"),
        ("dtype", ""),
        ("num_layers", LEAST),
        ("num_kv_heads", ours["num_kv_heads"] + 1),
        ("head_dim", MOST),
    ]
    rings = [
        _refused(f"{name} {value}", OPEN_RING, f"format.{name}", _ring(**ours | {name: value}))
        for name, value in formats
    ]
    num_bytes = 2 * 4 * NUM_TOKENS * ours["num_kv_heads"] * ours["head_dim"]
    headers: list[tuple[str, dict[str, int]]] = [
        ("layer", {"layer": MOST}),
        ("layer", {"layer": -1}),
        ("token_begin", {"token_begin": MOST, "token_end": LEAST}),
        ("token_begin", {"token_begin": -64}),
        ("head_begin", {"head_begin": MOST, "head_end": MOST}),
        ("head_begin", {"head_end": ours["num_kv_heads"] + 1}),
        ("num_bytes", {"num_bytes": 2**64 - 1}),
        ("num_bytes", {"token_end": MOST}),
    ]
    right = {"token_end": NUM_TOKENS, "head_end": ours["num_kv_heads"], "num_bytes": num_bytes}
    slabs = [
        _refused(f"slab of {wrong}", PUSH_SLABS, f"header.{name}", _slab(**right | wrong))
        for name, wrong in headers
    ]
    slabs += [
        _refused("a short slab", PUSH_SLABS, "payload", _slab(**right)),
        _malformed("noise", PUSH_SLABS),
    ]
    other = _ring(**ours | {"model_hash": "other"})
    return [
        *rings,
        _malformed("a ring of noise", OPEN_RING),
        _refused("a ring of nobody", OPEN_RING, "source_incarnation", b""),
        BadCall("a ring of others", OPEN_RING, other, Code.FAILED_PRECONDITION, reason="FORMAT_MISMATCH"),
        *_as_streams(slabs, SOURCE),
        *_as_streams(
            [
                BadCall(
                    "slabs of nobody", PUSH_SLABS, _slab(**right), Code.INVALID_ARGUMENT, reason="NO_SOURCE"
                )
            ]
        ),
    ]


def _transfer_address(leader: str, model: Model) -> str:
    """Where an engine of a decode group takes KV, as a placement of it says."""
    steps: SimpleQueue[decode_service_pb2.DecodeRequest | None] = SimpleQueue()
    steps.put(decode_service_pb2.DecodeRequest.FromString(_reserve(model)))
    with grpc.insecure_channel(leader) as channel:
        call: Any = DecodeServiceStub(channel).Decode(iter(steps.get, None), timeout=TIMEOUT_S)
        placement: placement_pb2.Placement = next(call).placement
        steps.put(None)
        return placement.shards[0].transfer_address


def _refused(name: str, method: str, field: str, raw: bytes, then: tuple[bytes, ...] = ()) -> BadCall:
    return BadCall(name, method, raw, Code.INVALID_ARGUMENT, field, then=then)


def _malformed(name: str, method: str) -> BadCall:
    return BadCall(name, method, NOISE, Code.INVALID_ARGUMENT, reason="MALFORMED_REQUEST")


def _as_streams(calls: list[BadCall], metadata: tuple[tuple[str, str], ...] = ()) -> list[BadCall]:
    return [replace(call, streams=True, metadata=metadata) for call in calls]


def _choice() -> prefill_service_pb2.TokenChoice:
    return prefill_service_pb2.TokenChoice(
        sampling=generation_pb2.SamplingSpec(temperature=0.0, top_p=1.0), max_tokens=4
    )


def _reserve(model: Model, edit: Edit = lambda _: None) -> bytes:
    reserve = Reserve(
        attempt=ATTEMPT, num_prompt_tokens=NUM_TOKENS, model_hash=model.model_hash, choice=_choice()
    )
    edit(reserve)
    return decode_service_pb2.DecodeRequest(reserve=reserve).SerializeToString()


def _prefill(edit: Edit) -> bytes:
    attention = placement_pb2.AttentionLayout(
        num_tokens=NUM_TOKENS, num_prefilled=NUM_TOKENS, exact=placement_pb2.ExactMask()
    )
    request = Prefill(attempt=ATTEMPT, token_ids=[5] * NUM_TOKENS, choice=_choice(), attention=attention)
    fence = placement_pb2.Fence(process_incarnation="x", epoch=1, attempt=ATTEMPT)
    request.placement.shards.add(token_end=NUM_TOKENS, transfer_address="127.0.0.1:1", fence=fence)
    edit(request)
    return request.SerializeToString()


def _send_prefix(edit: Edit) -> bytes:
    attention = placement_pb2.AttentionLayout(
        num_tokens=64, num_prefilled=64, exact=placement_pb2.ExactMask()
    )
    request = prefill_service_pb2.SendPrefixRequest(
        attempt=ATTEMPT, attention=attention, block_hashes=[b"x" * 32]
    )
    fence = placement_pb2.Fence(process_incarnation="x", epoch=1, attempt=ATTEMPT)
    request.placement.shards.add(token_end=64, transfer_address="127.0.0.1:1", fence=fence)
    edit(request)
    return request.SerializeToString()


def _source(**fields: object) -> Edit:
    source = {"group": "prefill-1", "leader_address": "127.0.0.1:1", "num_tokens": 64} | fields
    return lambda request: request.prefix_sources.add(**source)


def _billion_shards(request: Prefill) -> None:
    one, all_of_them = (
        placement_pb2.CsaLevel(group=1, stride=1),
        placement_pb2.CsaLevel(group=2**30, stride=2),
    )
    mask = placement_pb2.CsaMask(
        num_shards=2**30,
        shard_tokens=2,
        levels=[one, all_of_them],
        query_mode=placement_pb2.QUERY_MODE_SAMPLED,
    )
    request.attention.csa.CopyFrom(mask)


def _set(**fields: object) -> Edit:
    def edit(message: object) -> None:
        for name, value in fields.items():
            setattr(message, name, value)

    return edit


def _shard(**fields: object) -> Edit:
    return lambda request: _set(**fields)(request.placement.shards[0])


def _resize(**fields: Any) -> bytes:
    return decode_service_pb2.ResizeAttemptRequest(request_id="nobody", **fields).SerializeToString()


def _hello(**fields: Any) -> bytes:
    hello = group_service_pb2.FollowerHello(**fields)
    return group_service_pb2.JoinGroupRequest(hello=hello).SerializeToString()


def _ring(**kv_format: Any) -> bytes:
    return OpenRingRequest(source_incarnation="a-source", format=KvFormat(**kv_format)).SerializeToString()


def _slab(**header: Any) -> bytes:
    return PushSlabsRequest(
        header=SlabHeader(source_incarnation="a-source", **header), payload=bytes(64)
    ).SerializeToString()
