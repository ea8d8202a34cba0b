"""generate and status against a scripted router: arguments, documents, exit codes."""

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner, Result

from sps2.v1 import generation_pb2
from sps2_cli.demo import excerpt
from sps2_cli.main import app
from sps2_cli.rates import with_rates
from sps2_cli.status import pool_line
from sps2_client import Client
from support.fake_router import (
    FakeRouter,
    Script,
    delta,
    error_info,
    fail,
    finish,
    good_events,
    hang,
    play,
    usage,
)
from support.ports import free_port


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [*arguments], input=stdin)


def generate(router: FakeRouter, *arguments: str, stdin: str | None = None) -> Result:
    return run("generate", "--server", router.address, *arguments, stdin=stdin)


def documents(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_text_is_streamed_and_summed_up_on_stderr() -> None:
    with FakeRouter() as router:
        result = generate(router, "--prompt", "hi", "--max-tokens", "3", "--top-k", "5", "--ignore-eos")
    assert (result.exit_code, result.stdout) == (0, "Hello wörld\n")
    assert "[length] 11 prompt tokens (2 cached), 3 tokens out; ttft 400.0 ms" in result.stderr
    assert "KV transfer 300 B" in result.stderr
    spec = router.requests[0].spec
    assert (spec.text, spec.stop.max_tokens, spec.sampling.top_k, spec.stop.ignore_eos) == ("hi", 3, 5, True)
    assert not spec.sampling.HasField("temperature")


def test_document_of_one_answer() -> None:
    with FakeRouter() as router:
        result = generate(router, "--prompt", "hi", "--json", "--request-id", "mine")
    assert result.exit_code == 0
    (document,) = documents(result)
    assert document == {
        "text": "Hello wörld",
        "token_ids": [5, 6, 7],
        "finish_reason": "length",
        "logprobs": [],
        "more_choices": [],
        "usage": {"prompt_tokens": 11, "cached_tokens": 2, "output_tokens": 3},
        "timings_s": {
            "queue": 0.1,
            "prefill": 0.2,
            "transfer": 0.3,
            "ttft": 0.4,
            "tpot": 0.5,
            "e2e": 0.6,
            "tbt_p50": 0.7,
            "tbt_p99": 0.8,
        },
        "bytes": {"collective": 100, "q_exchange": 200, "kv_transfer": 300},
        "attention_profile": "exact",
        "request_id": "mine",
    }


def test_every_sampling_flag_reaches_the_wire() -> None:
    flags = (
        *("--temperature", "0.5", "--top-p", "0.75", "--top-k", "4", "--min-p", "0.25", "--seed", "7"),
        *("--repetition-penalty", "1.5", "--presence-penalty", "-1", "--frequency-penalty", "2"),
        *("--logit-bias", "17=-100,5=2.5", "--first-choice", "3", "--n", "1", "--logprobs", "20"),
        *(
            "--stop",
            "END",
            "--stop",
            "\n\n",
            "--stop-token-ids",
            "9",
            "--min-tokens",
            "2",
            "--max-tokens",
            "8",
        ),
    )
    with FakeRouter() as router:
        assert generate(router, "--prompt", "hi", *flags).exit_code == 0
    spec = router.requests[0].spec
    assert spec.sampling == generation_pb2.SamplingSpec(
        temperature=0.5,
        top_p=0.75,
        top_k=4,
        min_p=0.25,
        seed=7,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={17: -100, 5: 2.5},
        first_choice=3,
    )
    assert spec.stop == generation_pb2.StopSpec(
        stop_strings=["END", "\n\n"], stop_token_ids=[9], min_tokens=2, max_tokens=8
    )
    assert (spec.num_choices, spec.num_logprobs) == (1, 20)


def test_several_answers_come_one_after_the_other() -> None:
    first, second = delta("one", [1], 0), delta("two", [2], 0)
    ends = [finish([1]), finish([2])]
    second.choice_index = ends[1].choice_index = 1
    with FakeRouter(play([first, second, *ends, usage()])) as router:
        result = generate(router, "--prompt", "hi", "--n", "2")
    assert (result.exit_code, result.stdout) == (0, "--- 0 [length]\none\n--- 1 [length]\ntwo\n")


def test_biases_in_a_prompts_file() -> None:
    line = '{"prompt": "a", "logit_bias": {"17": -1.5}, "stop": ["x"]}'
    with FakeRouter() as router:
        assert generate(router, "--prompts-file", "-", stdin=line).exit_code == 0
    assert dict(router.requests[0].spec.sampling.logit_bias) == {17: -1.5}


def test_prompts_from_file_stdin_and_ids(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("from a file\n", encoding="utf-8")
    with FakeRouter() as router:
        assert generate(router, "--prompt-file", str(tmp_path / "p.txt")).exit_code == 0
        assert generate(router, "-", stdin="from stdin").exit_code == 0
        assert generate(router, "--token-ids", "3, 4 5", "--stop-token-ids", "9").exit_code == 0
    assert [one.spec.text for one in router.requests[:2]] == ["from a file\n", "from stdin"]
    assert list(router.requests[2].spec.token_ids.ids) == [3, 4, 5]
    assert list(router.requests[2].spec.stop.stop_token_ids) == [9]


def test_many_prompts_give_one_document_each() -> None:
    refuse = fail(grpc.StatusCode.INVALID_ARGUMENT, "no", error_info("EMPTY_PROMPT"))

    def by_prompt(request: Any, context: Any) -> Any:
        return (refuse if request.spec.text == "bad" else play(good_events()))(request, context)

    lines = ['"one"', '{"prompt": "bad"}', "", '{"token_ids": [1], "max_tokens": 2, "request_id": "r"}']
    with FakeRouter(by_prompt) as router:
        result = generate(router, "--prompts-file", "-", "--max-tokens", "9", stdin="\n".join(lines))
    assert result.exit_code == 3
    found = {one["index"]: one for one in documents(result)}
    assert [found[index].get("text") for index in range(3)] == ["Hello wörld", "", "Hello wörld"]
    assert found[1]["error"]["reason"] == "EMPTY_PROMPT"
    assert found[2]["request_id"] == "r"
    limits = {one.spec.text: one.spec.stop.max_tokens for one in router.requests}
    assert limits == {"one": 9, "bad": 9, "": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "exactly one"),
        (("--prompt", "a", "--token-ids", "1"), "exactly one"),
        (("--token-ids", "1,x"), "invalid literal"),
        (("prompt",), "unexpected argument"),
        (("--prompt-file", "/nonexistent"), "cannot read"),
        (("--prompt", "a", "--timeout", "0"), "must be positive"),
        (("--prompt", "a", "--logit-bias", "5"), "is not ID=NUMBER"),
        (("--prompt", "a", "--logit-bias", "5=1,5=2"), "has two biases"),
        (("--prompt", "a", "--max-tokens", "many"), "--max-tokens"),
        (("--no-such-flag",), "No such option"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], message: str) -> None:
    result = run("generate", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_wrong_lines_of_a_prompts_file_name_their_number() -> None:
    for line, message in (("{", "line 2"), ("[1]", "neither"), ('{"promt": "a"}', "unknown keys promt")):
        result = run("generate", "--prompts-file", "-", stdin=f'"fine"\n{line}\n')
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())


BAD = fail(grpc.StatusCode.INVALID_ARGUMENT, "bad prompt", error_info("EMPTY_PROMPT"))
LOST = fail(
    grpc.StatusCode.UNAVAILABLE,
    "lost",
    error_info("GROUP_LOST", component="decode-0/1"),
    after=good_events()[:1],
)


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        (BAD, 3, "refused: INVALID_ARGUMENT EMPTY_PROMPT: bad prompt"),
        (fail(grpc.StatusCode.UNAVAILABLE, "full", error_info("QUEUE_FULL")), 3, "QUEUE_FULL"),
        (fail(grpc.StatusCode.INTERNAL, "oops", error_info("BUG")), 1, "failed: INTERNAL BUG: oops"),
        (LOST, 1, "component: decode-0/1"),
        (play([delta("a", [1], 0)]), 1, "MISSING_FINISH"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_exit_codes(script: Script, code: int, said: str, as_json: bool) -> None:
    with FakeRouter(script) as router:
        result = generate(router, "--prompt", "hi", *(["--json"] if as_json else []))
    assert result.exit_code == code
    assert said in result.stderr
    if as_json:
        (document,) = documents(result)
        assert set(document) == {"error", "request_id", "text", "token_ids"}


def test_a_timeout_is_a_failure() -> None:
    with FakeRouter(hang()) as router:
        result = generate(router, "--prompt", "hi", "--first-token-timeout", "0.2")
    assert (result.exit_code, "nothing came within 0.2 s" in result.stderr) == (1, True)


def test_nobody_there() -> None:
    result = run("status", "--server", f"127.0.0.1:{free_port()}")
    assert result.exit_code == 4
    assert "cannot connect" in result.stderr


def test_status_for_programs_and_people() -> None:
    with FakeRouter() as router:
        (document,) = documents(run("status", "--server", router.address, "--json"))
        people = run("status", "--server", router.address)
    assert (document["directory_connected"], document["num_requests_live"]) == (True, 1)
    (decode,) = document["pools"]["decode"]
    assert (decode["group"], decode["ready"], decode["num_requests_live"]) == ("decode-0", True, 1)
    assert [one["kv_blocks_used"] for one in decode["ranks"]] == [25, 25]
    assert people.exit_code == 0
    assert document["num_queued_tokens"] == 1234
    assert "tokens queued 1,234" in people.stdout
    assert "decode: 1 of 1 groups ready" in people.stdout
    assert "25/100 (25%)" in people.stdout


@pytest.mark.parametrize("command", [(), ("up",), ("generate",), ("status",), ("demo",)])
def test_help_has_examples(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"sps2 {command[0] if command else 'up'}" in result.stdout
    assert "For example" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prefill", "2"),
        ("--decode", "0x2"),
        ("--listen", "nowhere"),
        ("--model", "/nonexistent"),
        ("--dtype", "fp64"),
        ("--profile", "sparse"),
    ],
)
def test_usage_errors_of_up(arguments: tuple[str, ...]) -> None:
    assert run("up", *arguments).exit_code == 2


def test_the_demo_cuts_its_text_at_a_word_and_repeats_what_is_too_short() -> None:
    with FakeRouter() as router, Client(router.address) as client:  # one token for each byte
        text = excerpt(client, "seven words make up this short text ", 300)
    assert 300 <= len(text) <= 364
    assert text.split(" ")[-1] in {"seven", "words", "make", "up", "this", "short", "text"}


def test_drain_says_how_long_it_may_take() -> None:
    with FakeRouter() as router:
        done = run("drain", "decode-0", "--server", router.address)
        unknown = run("drain", "decode-9", "--server", router.address)
    assert (done.exit_code, done.stdout) == (0, "decode-0 is draining; its requests have 7 s to finish\n")
    assert (unknown.exit_code, "decode-9" in unknown.stderr) == (3, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["prefil=2"], "is not POOL=GROUPS"),
        (["prefill"], "is not POOL=GROUPS"),
        (["decode=0"], "1 to 256 groups"),
        (["decode=two"], "1 to 256 groups"),
        (["decode=1", "decode=2"], "given twice"),
        (["decode=1", "--server", "nowhere"], "is not HOST:PORT"),
    ],
)
def test_scale_refuses_what_it_cannot_mean(words: list[str], says: str) -> None:
    result = run("scale", *words)
    assert (result.exit_code, says in result.stderr) == (2, True), result.stderr


def test_scale_without_a_deployment_cannot_connect() -> None:
    port = free_port()
    result = run("scale", "decode=2", "--server", f"127.0.0.1:{port}", "--json")
    assert result.exit_code == 4
    (event,) = documents(result)
    assert f"serves port {port}" in event["message"]


def test_top_shows_the_rates_between_two_looks() -> None:
    with FakeRouter() as router:
        shown = run("top", "--once", "--interval", "0.1", "--server", router.address)
        result = run("top", "--once", "--json", "--interval", "0.1", "--server", router.address)
    assert (shown.exit_code, result.exit_code) == (0, 0)
    assert "decode: 1 of 1 groups ready; 1 requests" in shown.stdout
    (document,) = documents(result)
    (group,) = document["pools"]["decode"]
    assert (group["state"], [one["steps_per_s"] for one in group["ranks"]]) == ("ready", [0.0, 0.0])


def looked(steps: int, sent: int) -> dict[str, Any]:
    rank = {
        "worker_id": "decode-0/0",
        "steps_done": steps,
        "bytes_posted": {"q_exchange": sent, "kv_move": 1},
    }
    return {"pools": {"decode": [{"group": "decode-0", "ranks": [rank]}]}}


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (looked(10, 300), (5.0, 50.0)),
        (None, (0.0, 0.0)),
        # It has been started anew.
        (looked(30, 300), (0.0, 0.0)),
        ({"pools": {}}, (0.0, 0.0)),
    ],
)
def test_rates_are_what_counters_gain(before: dict[str, Any] | None, expected: tuple[float, float]) -> None:
    rated = with_rates(before, looked(20, 400), 2.0)
    (rank,) = rated["pools"]["decode"][0]["ranks"]
    assert (rank["steps_per_s"], rank["posted_bytes_per_s"]) == expected


def test_a_pool_says_which_groups_come_and_go() -> None:
    states = ["ready", "draining", "starting", "ready"]
    assert pool_line([{"state": one} for one in states]) == "2 of 4 groups ready, 1 starting, 1 draining"
