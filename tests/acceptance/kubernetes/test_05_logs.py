"""Must show 5: JSON lines with request id and attempt across services; what users write is in no log and no span."""

import json
import os
import secrets
import signal
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest

from sps2.v1 import generation_pb2
from sps2_client import Client
from support.collector import Collector, collector
from support.deployment import LocalDeployment, deployment, engine_pid
from support.identity import book_ids
from support.metrics import scrape
from support.must_show import MustShow
from support.ports import free_port_range
from support.raw_calls import generate
from support.streams import wait_for_free_kv
from support.waiting import wait_until

pytestmark = pytest.mark.acceptance

CANARY = "canary-7f3a"
TOKEN = "token-canary-91c2"
CANARY_IDS = [1013, 1019, 1021, 1031, 1033, 1039]
LONG = 12_000
NUM_TOKENS = 200
LOG_S = 30.0
NUM_SERVICES = 6
"""Directory, router and four ranks."""


def test_logs(must_show: MustShow, tmp_path: Path) -> None:
    env = {"SPS2_LOG_LEVEL": "debug"}
    arguments = ["--log-dir", str(tmp_path), "--metrics-port-base", str(free_port_range(NUM_SERVICES))]
    with must_show("5 logs: JSON with request id and attempt, nothing that users write") as figures:
        with (
            collector() as traces,
            deployment(arguments=arguments, env=traces.environment | env) as running,
        ):
            failed_over = _use(running)
            metrics = [scrape(address).text for address in running.metrics.values()]
        output = running.process.output
        logs = {path.stem: path.read_text().splitlines() for path in sorted(tmp_path.glob("*.log"))}
        lines = {name: _parsed(text) for name, text in logs.items() if name != "redis"}
        others = Counter({name: len(logs[name]) - len(found) for name, found in lines.items()})
        figures.append(f"{sum(map(len, lines.values()))} JSON lines of {len(lines)} processes")
        assert not others.total(), {name: _odd(logs[name]) for name in others if others[name]}
        for name in ("router", "prefill-0-0", "decode-0-0"):
            attempts = {one["attempt"] for one in lines[name] if _is_of(one, failed_over)}
            assert len(attempts) >= 2, f"{name} tells of attempts {attempts}"
        given_up = [one["service"] for found in lines.values() for one in found if "given up" in one["event"]]
        assert set(given_up) >= {"prefill-0/0 engine", "prefill-0/1 engine"}
        figures.append(
            f"a failover's attempts in router and leaders, a cancel in {len(set(given_up))} engines"
        )
        _check_silent([output, *metrics, *("\n".join(text) for text in logs.values())], traces)
        figures.append(
            f"no canary in them, in {len(metrics)} services' metrics or in {len(traces.spans)} spans"
        )


def _use(running: LocalDeployment) -> str:
    """Prompts of each kind, refusals, a cancel, a failover; the id of the request that failed over."""
    spec = generation_pb2.GenerationSpec(text=CANARY)
    spec.stop.max_tokens = 4
    authorization = ("authorization", f"Bearer {TOKEN}")
    generate(running.address, spec, authorization)
    for field, value in (("top_p", 2), ("temperature", -1)):
        wrong = generation_pb2.GenerationSpec(text=CANARY)
        setattr(wrong.sampling, field, value)
        with pytest.raises(grpc.RpcError):
            generate(running.address, wrong, authorization)
    chat = generation_pb2.GenerationSpec()
    chat.chat.messages.add(role="user", content=CANARY)
    with pytest.raises(grpc.RpcError):  # the demo model has no chat template
        generate(running.address, chat, authorization)
    text = [*CANARY_IDS, *book_ids()]
    with running.client() as client:
        _cancel(client, (text * (1 + LONG // len(text)))[:LONG])
        return _fail_over(running, client, text[:500])


def _cancel(client: Client, prompt: list[int]) -> None:
    """While the ranks compute."""
    request_id = f"cancelled-{secrets.token_hex(4)}"
    with client.stream(token_ids=prompt, max_tokens=4, request_id=request_id) as stream:
        wait_until(lambda: "prefill-0" in client.cluster_state().num_requests_by_group, timeout=LOG_S)
        with closing(client.watch(request_id)) as progress:
            next(one for one in progress if one.prefill_fraction > 0)
        stream.close()
    wait_for_free_kv(client)


def _fail_over(running: LocalDeployment, client: Client, prompt: list[int]) -> str:
    request_id = f"moved-{secrets.token_hex(4)}"
    with client.stream(
        token_ids=prompt, max_tokens=NUM_TOKENS, ignore_eos=True, request_id=request_id
    ) as stream:
        next(iter(stream))
        os.kill(engine_pid(running.pids["decode-0/1"]), signal.SIGKILL)
        assert stream.final().usage.output_tokens == NUM_TOKENS
    return request_id


def _is_of(line: dict[str, Any], request_id: str) -> bool:
    return line.get("request_id") == request_id and "attempt" in line


def _parsed(lines: list[str]) -> list[dict[str, Any]]:
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"event", "level", "timestamp", "service"} <= record.keys():
            found.append(record)
    return found


def _odd(lines: list[str]) -> list[str]:
    return [line[:200] for line in lines if not _parsed([line])][:5]


def _check_silent(texts: list[str], traces: Collector) -> None:
    ids = [", ".join(map(str, CANARY_IDS)), " ".join(map(str, CANARY_IDS)), ",".join(map(str, CANARY_IDS))]
    for written in (CANARY, TOKEN, *ids):
        assert not any(written in text for text in texts)
        assert not any(written.encode() in batch for batch in traces.raw)
