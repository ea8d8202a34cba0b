"""The plan of a local deployment, its logs, and the demo's task: all without a process."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sps2_cli.documents import duration, size
from sps2_cli.facts import FactBook, is_right, plant
from sps2_cli.local.interrupts import Interrupts
from sps2_cli.local.logs import KEEP_LINES, LineLog, cause, needs_context, readable
from sps2_cli.local.metrics import MetricsPorts
from sps2_cli.local.plan import (
    Commands,
    Cores,
    Pool,
    UpOptions,
    default_threads,
    directory_spec,
    follower_specs,
    leader_specs,
    router_spec,
    split_password,
)
from sps2_cli.local.process import WRAPPER, exit_text
from sps2_cli.local.redis import EmbeddedRedis, redis_spec

OPTIONS = UpOptions(model=Path("/m/demo"), prefill=Pool(2, 2), decode=Pool(1, 3), threads=4)


def flags(command: tuple[str, ...]) -> dict[str, str]:
    start = next(index for index, part in enumerate(command) if part.startswith("--"))
    return dict(zip(command[start::2], command[start + 1 :: 2], strict=True))


@pytest.mark.parametrize("text", ["", "1", "1x", "x2", "0x1", "1x0", "-1x2", "1x2x3", "999x999"])
def test_pools_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="x"):
        Pool.parse(text)


def test_pools() -> None:
    assert (Pool.parse("2x4"), str(Pool(2, 4)), Pool(2, 4).total) == (Pool(2, 4), "2x4", 8)
    assert default_threads(2, Pool(1, 2), Pool(1, 2)) == 1
    assert default_threads(16, Pool(1, 2), Pool(1, 2)) == 4


def test_every_rank_is_started_once_with_its_leader() -> None:
    leaders = leader_specs(OPTIONS, Commands(), "d:1")
    followers = follower_specs(OPTIONS, Commands(), "d:1", {spec.name: f"at-{spec.name}" for spec in leaders})
    assert sorted(spec.name for spec in [*leaders, *followers]) == sorted(OPTIONS.worker_ids)
    assert [spec.name for spec in leaders] == ["prefill-0/0", "prefill-1/0", "decode-0/0"]
    last = followers[-1]
    assert last.command[1:3] == ("-m", "sps2_decode_worker")
    assert flags(last.command[3:]) == {
        "--group": "decode-0",
        "--rank": "2",
        "--group-size": "3",
        "--model": "/m/demo",
        "--model-name": "demo",
        "--directory": "d:1",
        "--device": "auto",
        "--dtype": "fp32",
        "--kv-tokens": "65536",
        "--threads": "4",
        "--kv-transport": "auto",
        "--tp": "1",
        "--drain-s": "30",
        "--leader": "at-decode-0/0",
    }
    assert "--leader" not in leaders[0].command
    exchanges = [flags(spec.command[3:]).get("--exchange") for spec in (leaders[0], followers[0])]
    assert exchanges == ["auto", "auto"], "rank 0 decides, the others are told the same all the same"
    assert flags(leaders[0].command[3:])["--tp"] == "1"
    router = router_spec(OPTIONS, Commands(), "d:1")
    assert router.listen == "127.0.0.1:50051"
    assert flags(router.command[3:])["--profile"] == "exact"
    assert last.at("h:9").listen == "h:9"


def test_metrics_ports_follow_each_other_and_stay() -> None:
    directory, *leaders = directory_spec(Commands(), "redis://h:1"), *leader_specs(OPTIONS, Commands(), "d:1")
    ports = MetricsPorts(9090)
    assert [ports.given(one).metrics for one in (directory, *leaders)] == [
        f"127.0.0.1:{port}" for port in range(9090, 9094)
    ]
    assert ports.given(leaders[0].at("h:9")).metrics == "127.0.0.1:9091", "it was started again"
    assert ports.given(redis_spec(EmbeddedRedis(6380, "s3cret"))).metrics == ""
    assert MetricsPorts(None).given(directory).metrics == ""


def test_ranks_that_split_layers() -> None:
    options = replace(OPTIONS, prefill=Pool(1, 4), prefill_tp=2, decode=Pool(1, 6), decode_tp=3)
    specs = leader_specs(options, Commands(), "d:1")
    assert [flags(spec.command[3:])["--tp"] for spec in specs] == ["2", "3"]
    with pytest.raises(ValueError, match="make --prefill a multiple of 4, for example 1x8"):
        replace(OPTIONS, prefill=Pool(1, 6), prefill_tp=4)
    with pytest.raises(ValueError, match="make --decode a multiple of 2, for example 1x4"):
        replace(OPTIONS, decode=Pool(1, 3), decode_tp=2)


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "1;2", "1,,2"])
def test_cores_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no list of cores"):
        Cores.parse(text)


def test_pools_with_cores_of_their_own() -> None:
    assert Cores.parse("8, 0-2,1") == Cores((0, 1, 2, 8))
    assert str(Cores.parse("0-2,8")) == "0,1,2,8"
    pinned = replace(OPTIONS, threads=None, cores=16, prefill_cpus=Cores.parse("0-11"))
    prefill, _, decode = leader_specs(pinned, Commands(), "d:1")
    assert (prefill.cpus, flags(prefill.command[3:])["--threads"]) == (Cores(tuple(range(12))), "3")
    assert (decode.cpus, flags(decode.command[3:])["--threads"]) == (Cores(), "2"), "16 cores, 7 ranks"
    few = replace(pinned, decode_cpus=Cores((15,)))
    assert flags(leader_specs(few, Commands(), "d:1")[2].command[3:])["--threads"] == "1"


def test_a_pinned_process_has_its_cores_from_the_start() -> None:
    core = max(os.sched_getaffinity(0))
    show = "import os; print(os.sched_getaffinity(0))"
    command = [*WRAPPER, str(os.getpid()), "--cpus", str(core), sys.executable, "-I", "-S", "-c", show]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    assert result.stdout == f"{{{core}}}\n"


def test_the_password_of_redis_stands_in_no_command_line() -> None:
    redis = EmbeddedRedis(6380, "s3cret")
    spec, directory = redis_spec(redis), directory_spec(Commands(), redis.url)
    assert "requirepass s3cret\n" in spec.stdin
    assert not any("s3cret" in part for one in (spec, directory) for part in one.command)
    assert "s3cret" not in repr(spec) + repr(directory) + repr(redis)
    assert flags(directory.command[3:])["--redis"] == "redis://127.0.0.1:6380/0"
    assert directory.env == {"SPS2_REDIS_PASSWORD": "s3cret"}
    assert split_password("redis://me:p@h:1/2") == ("redis://me@h:1/2", "p")
    assert split_password("redis://h:1") == ("redis://h:1", None)


def test_log_lines_for_people() -> None:
    line = json.dumps({"event": "listening", "level": "info", "address": "h:1", "timestamp": "t"})
    assert readable(line) == "info    listening address=h:1"
    assert readable("plain") == "plain"
    assert readable("{not json") == "{not json"
    assert readable('{"event": "x", "exception": "Traceback\\nE"}') == "info    x\nTraceback\nE"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([], ""),
        (["warming up", "model: tensor lm_head is missing"], "model: tensor lm_head is missing"),
        (
            ['{"event": "cannot start", "level": "error", "reason": "in use"}', '{"event": "stopped"}'],
            "cannot start: in use",
        ),
        (
            ['{"event": "the service failed", "level": "error", "exception": "Traceback\\nValueError: x"}'],
            "the service failed: ValueError: x",
        ),
        (
            ["2026 [error    ] cannot start reason=x", "2026 [info     ] stopped"],
            "2026 [error    ] cannot start reason=x",
        ),
        (['{"event": "stopped", "level": "info"}'], "info    stopped"),
    ],
)
def test_cause_of_a_failure(lines: list[str], found: str) -> None:
    assert cause(lines) == found


def test_tracebacks_and_silence_need_context() -> None:
    assert needs_context([])
    assert needs_context(["Traceback (most recent call last):", "E"])
    assert not needs_context(["one clear line"])


def test_logs_are_bounded_and_shown_with_their_name(tmp_path: Path) -> None:
    shown: list[str] = []
    log = LineLog("prefill-0/1", shown.append, None)
    for number in range(500):
        log.add(f"line {number}\n")
    log.add("x" * 10_000)
    assert (len(log.tail), log.tail[-1]) == (KEEP_LINES, "x" * 2000)
    assert shown[0] == "prefill-0/1 | line 0"
    log.add('{"event": "epoch 1", "service": "prefill-0/1 engine"}')
    assert shown[-1] == "prefill-0/1 engine | info    epoch 1"
    filed = LineLog("prefill-0/1", shown.append, tmp_path)
    filed.add("to the file")
    filed.close()
    assert (tmp_path / "prefill-0-1.log").read_text() == "to the file\n"
    assert "to the file" not in shown[-1]


def test_interrupts_count_and_are_taken_back() -> None:
    import signal

    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert not interrupts.stop
        os.kill(os.getpid(), signal.SIGINT)
        assert (interrupts.stop, interrupts.now) == (True, False)
        interrupts.sleep(30)  # returns at once
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.now
    assert signal.getsignal(signal.SIGINT) is before


def test_words_for_numbers() -> None:
    assert [duration(1.5), duration(0.0012)] == ["1.50 s", "1.2 ms"]
    assert [size(12), size(1536), size(5 * 1024**4)] == ["12 B", "1.5 KiB", "5120.0 GiB"]
    assert [exit_text(1), exit_text(-9), exit_text(-99)] == [
        "exit code 1",
        "killed by SIGKILL",
        "killed by signal 99",
    ]


BOOK = FactBook(("falcon", "otter"), ("amber", "azure"), " Remember: {name} {value}.", " Remember: {name}")


def test_a_planted_fact_stands_at_a_word_and_is_new_to_the_text() -> None:
    text = "An Otter saw amber light in the morning"
    for seed in range(20):
        task = plant(text, BOOK, random.Random(seed))
        assert (task.fact, task.expected) == (" Remember: falcon azure.", "azure")
        assert task.prompt.endswith(" Remember: falcon")
        assert task.prompt.replace(task.fact, "", 1) == text + task.question
        assert task.prompt.index(task.fact) == task.position
    assert plant(text, BOOK, random.Random(3)) == plant(text, BOOK, random.Random(3))


def test_right_answers() -> None:
    assert is_right(" amber. And so", "amber")
    assert not is_right(" ambergris", "amber")
    assert not is_right(" the amber", "amber")
    assert not is_right("", "amber")
