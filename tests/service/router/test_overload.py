"""The router over real gRPC. Three times as much as its groups can take: what is let in, and what is sent away."""

import hashlib
from pathlib import Path

import pytest
from google.rpc import error_details_pb2

from sps2.v1 import inference_service_pb2 as pb
from sps2_client import AsyncClient
from support.overload import Calls, offer, quantile, settle
from support.router_deployment import Code, Deployment, detail, failure, prompt, reason, until

pytestmark = pytest.mark.service

COMPUTE_S = 0.15
MAX_QUEUE_S = 2.0
CALLS = Calls(num_prompt=100, num_output=4, timeout_s=20)


async def test_overload_sheds_early_and_goes_on_as_before() -> None:
    async with Deployment(max_queue_s=MAX_QUEUE_S) as up, AsyncClient(up.address, max_retries=0) as client:
        up.prefill.compute_s = COMPUTE_S
        rate = 1 / COMPUTE_S
        outcome = await offer(client, CALLS, 3 * rate, seconds=4.0, seed=1)
        assert not outcome.failures
        assert outcome.goodput >= 0.7 * rate, outcome
        assert len(outcome.shed_s) >= outcome.num_calls / 3
        assert len(outcome.retry_after_s) == len(outcome.shed_s)
        assert min(outcome.retry_after_s) < max(outcome.retry_after_s)
        # Nearly all hear of it at once, and not after they have waited.
        assert quantile(outcome.shed_s, 0.9) < 0.5, outcome
        assert max(outcome.answered_s) < 2 * MAX_QUEUE_S
        assert outcome.most_queued <= 1.5 * MAX_QUEUE_S * rate * CALLS.num_prompt
        assert outcome.tail_s < 2 * MAX_QUEUE_S
        await settle(client)
        after = await offer(client, CALLS, rate / 3, seconds=1.0, seed=2)
        assert not after.shed_s
        assert not after.failures
        await up.assert_all_freed()


async def test_tenants_share_and_have_quotas(tmp_path: Path) -> None:
    tokens, tenants = tmp_path / "tokens", tmp_path / "tenants"
    names = ("big", "small", "bound")
    tokens.write_text("".join(f"{name} {hashlib.sha256(name.encode()).hexdigest()}\n" for name in names))
    tenants.write_text("big weight=3\nbound max-queued-tokens=20\n")

    async with Deployment(auth_tokens=tokens, tenants=tenants, prefills_per_group=1) as up:

        def ask(tenant: str, number: int) -> pb.GenerateTextRequest:
            return pb.GenerateTextRequest(spec=prompt("x" * 20, request_id=f"{tenant}-{number}", nonce=b"n"))

        def call(tenant: str, number: int = 0):  # type: ignore[no-untyped-def] # a call of grpc.aio
            metadata = (("authorization", f"Bearer {tenant}"),)
            return up.inference.GenerateText(ask(tenant, number), metadata=metadata, timeout=10)

        up.prefill.may_sample.clear()
        calls = [call("small", 99)]
        await until(lambda: up.prefill.num_live)
        for number in range(4):
            calls += [call("small", number), call("big", number)]
        calls.append(call("bound"))
        await until(lambda: up.router._admission.num_live == len(calls))
        await until(lambda: up.router._queue._tokens_of["bound"])
        error = await failure(call("bound", 1))
        assert (error.code(), reason(error)) == (Code.RESOURCE_EXHAUSTED, "TENANT_QUEUE_FULL")
        (violation,) = detail(error, error_details_pb2.QuotaFailure()).violations
        assert violation.subject == "tenant:bound"
        assert detail(error, error_details_pb2.RetryInfo()).HasField("retry_delay")
        up.prefill.may_sample.set()
        for one in calls:
            assert (await one).text == "abcd"
        order = [one.attempt.request_id.partition("-")[0] for one in up.prefill.requests]
        # The first of each tenant, then three of the big one for each of the small one.
        assert order[1:].index("bound") <= 3
        assert order[1:7].count("big") == 4
        await up.assert_all_freed()
