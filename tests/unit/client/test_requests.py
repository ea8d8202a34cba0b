"""Arguments to the wire, limits, and the alarms of blocking waits."""

import threading
import time

import pytest

from sps2_client import Timeouts
from sps2_client._alarms import Alarm, AlarmClock
from sps2_client._options import retry_delay
from sps2_client._requests import stream_request


def test_only_what_was_given_is_set() -> None:
    spec = stream_request("hi").spec
    assert (spec.text, spec.WhichOneof("prompt"), spec.stop.HasField("max_tokens")) == ("hi", "text", False)
    assert not spec.sampling.HasField("temperature")
    spec = stream_request(None, token_ids=[3], temperature=0.0, top_k=-1, stop_token_ids=[2]).spec
    assert (list(spec.token_ids.ids), spec.sampling.HasField("temperature"), spec.sampling.top_k) == (
        [3],
        True,
        -1,
    )
    assert list(spec.stop.stop_token_ids) == [2]
    assert spec.attention_profile == ""
    assert stream_request("hi", attention_profile="paper").spec.attention_profile == "paper"
    assert stream_request("hi", priority=-3).spec.priority == -3


def test_empty_prompts_reach_the_service_which_refuses_them() -> None:
    assert stream_request("").spec.WhichOneof("prompt") == "text"
    assert stream_request(None, token_ids=[]).spec.WhichOneof("prompt") == "token_ids"


def test_ids_and_nonces_are_drawn_anew() -> None:
    first, second = stream_request("a").spec, stream_request("a").spec
    assert first.request_id != second.request_id
    assert first.nonce != second.nonce
    assert len(first.request_id) <= 64


@pytest.mark.parametrize(
    "options", [{}, {"prompt": "a", "token_ids": [1]}, {"prompt": "a", "max_tokens": 2**40}]
)
def test_arguments_that_make_no_request(options: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        stream_request(options.pop("prompt", None), **options)  # type: ignore[arg-type]


def test_one_string_is_no_list_of_stops() -> None:
    with pytest.raises(TypeError, match="list of strings"):
        stream_request("a", stop="END")


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="max_token"):
        stream_request("a", max_token=3)  # type: ignore[call-arg]


def test_timeouts() -> None:
    assert Timeouts.of(3) == Timeouts(total=3)
    assert Timeouts.of(None) == Timeouts()
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="first_token"):
            Timeouts(first_token=wrong)
    assert [retry_delay(n) for n in (0, 1, 9)] == [0.1, 0.3, 1.0]


def test_alarms_go_off_only_when_armed_long_enough() -> None:
    clock, rung = AlarmClock(), threading.Event()
    alarm = Alarm(clock)
    for _ in range(100):
        with alarm.armed(30, rung.set):
            pass
    with alarm.armed(None, rung.set):
        time.sleep(0.01)
    assert (alarm.fired, rung.is_set()) == (False, False)
    with alarm.armed(0.05, rung.set):
        assert rung.wait(5)
    assert alarm.fired
    clock.close()


def test_setting_an_alarm_often_keeps_one_entry() -> None:
    clock = AlarmClock()
    alarm = Alarm(clock)
    for _ in range(1000):
        with alarm.armed(30, lambda: None):
            pass
    assert len(clock._queue) == 1
    clock.close()
