"""Steps of the drill under load: pools that grow and shrink, rollouts, ends amid a stream, a container that is killed.

Apart from `drill` because tokens are judged here, for which torch is loaded.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sps2_client import Client
from support.deployment import DEMO_MODEL
from support.elastic import Load, group_of, same_tokens, uses
from support.faults import SEEN_BEFORE, read_tokens
from support.identity import GENERATE_TIMEOUT_S, book_ids
from support.kubelet.container import Container
from support.kubelet.controllers import Workload
from support.kubelet.drill import SETTLE_S, Drill
from support.kubelet.environment import Object
from support.kubelet.pod import Pod
from support.streams import Asked, ask, mixed_requests, wait_for_free_kv
from support.waiting import wait_until

REQUESTS = mixed_requests([150, 40, 300, 90, 700, 20], least_tokens=60)
"""Their streams last about a second on a quiet machine."""
NUM_CLIENTS = 4
MAX_RETRIES = 2
"""The SDK's own: of a connection that is lost before the first token."""
LONG = Asked(book_ids()[:600], 1500, 5)
"""A stream of seconds, sampled: its tokens may not differ at all."""
AFTER_SIGTERM_S = 10.0
"""A stream that a pod's end meets goes on for about so long after preStop."""
USED_S = 60.0


@contextmanager
def load(drill: Drill) -> Iterator[Object]:
    """Clients that ask without a pause during the block; what came of it is in the figures at its end."""
    figures: Object = {}
    with drill.client() as client:
        alone = [ask(client, one) for one in REQUESTS]
    with Load(drill.address, DEMO_MODEL, REQUESTS, alone, NUM_CLIENTS, MAX_RETRIES) as running:
        yield figures
    figures |= {
        "answers": running.num_answers,
        "failures": running.failures,
        "compared": running.tally.num_compared,
        "flips": running.tally.num_flips,
        "longest_s": round(running.longest_s, 2),
    }


def scale(drill: Drill, component: str) -> Object:
    """A pool from one group to two and back, by the replicas of its Deployment."""
    workload = drill.workload(component)
    before = _names(workload)
    with load(drill) as figures:
        drill.running.do(lambda: workload.scale(2))
        drill.running.wait_settled(SETTLE_S, [workload.name])
        (added,) = set(_names(workload)) - set(before)
        wait_until(lambda: _used(drill, added), USED_S)
        drill.running.do(lambda: workload.scale(1))
        drill.running.wait_settled(SETTLE_S, [workload.name])
    return {**figures, "added": added, "groups": _names(workload), "before": before}


def restart(drill: Drill, component: str) -> Object:
    """`kubectl rollout restart` of a workload."""
    workload = drill.workload(component)
    before = _names(workload)
    with load(drill) as figures:
        drill.running.do(lambda: workload.restart(f"{time.time()}"))
        drill.running.wait_settled(SETTLE_S, [workload.name])
    return {**figures, "before": before, "after": _names(workload)}


def end_amid_a_stream(drill: Drill, component: str) -> Object:
    """A pod is deleted while it serves a stream of seconds, which must come to its end."""
    (pre_stop_s,) = {one.pre_stop_s for one in drill.workload(component).pods[0].containers}
    with drill.client() as client:
        asked = _lasting(client, pre_stop_s + AFTER_SIGTERM_S)
        alone = ask(client, asked)
        with client.stream(timeout=GENERATE_TIMEOUT_S, **asked.options) as stream:
            read_tokens(stream, SEEN_BEFORE)
            pod = _serving(drill, client, component)
            began = time.monotonic()
            drill.running.do(pod.delete)
            tokens = stream.final().token_ids
            stream_s = time.monotonic() - began
    drill.running.wait_for(lambda: pod.gone, pod.grace_s)
    drill.running.wait_settled(SETTLE_S)
    same_tokens(DEMO_MODEL, asked, tokens, alone.token_ids).check()
    return {
        "pod": pod.name,
        "tokens": len(tokens),
        "sigterm_s": pre_stop_s,
        "stream_s": round(stream_s, 2),
        "stop_s": [round(one.stop_s, 2) for one in pod.exits],
        "grace_s": pod.grace_s,
    }


def kill(drill: Drill, component: str) -> Object:
    """SIGKILL to the last rank's container of a group: it comes again, and the group with it."""
    (pod,) = drill.workload(component).pods
    survivor, victim = pod.containers
    with drill.client() as client:
        alone = ask(client, LONG)
        epoch = _epoch(client, component)
        pid = survivor.pid
        drill.running.do(victim.kill)
        began = time.monotonic()
        drill.running.wait_for(lambda: _is_back(pod, victim), SETTLE_S)
        wait_until(lambda: _epoch(client, component) > epoch, SETTLE_S)
        back_s = time.monotonic() - began
        again = ask(client, LONG)
        wait_for_free_kv(client)
        same_tokens(DEMO_MODEL, LONG, again.token_ids, alone.token_ids).check()
        return {
            "codes": [one.code for one in pod.exits],
            "survivor_stayed": survivor.pid == pid and survivor.num_starts == 1,
            "epochs": [epoch, _epoch(client, component)],
            "back_s": round(back_s, 2),
        }


def _lasting(client: Client, seconds: float) -> Asked:
    """A stream of at least so many seconds, at the speed of now."""
    once = ask(client, LONG)
    times = max(1, math.ceil(seconds / (once.ended - once.began)))
    return replace(LONG, num_tokens=times * LONG.num_tokens)


def _names(workload: Workload) -> list[str]:
    return sorted(pod.name for pod in workload.pods)


def _router_log(drill: Drill) -> Path:
    (pod,) = drill.workload("router").pods
    return pod.containers[0].log_path()


def _used(drill: Drill, group: str) -> bool:
    return any(one.group == group and one.after_s is not None for one in uses(_router_log(drill)))


def _serving(drill: Drill, client: Client, component: str) -> Pod:
    """The pod that has to do with the one stream there is."""
    pods = drill.workload(component).pods
    if component in {"prefill", "decode"}:
        return next(pod for pod in pods if pod.name == group_of(client, f"sps2-{component}"))
    return pods[0]


def _is_back(pod: Pod, victim: Container) -> bool:
    return victim.num_starts == 2 and pod.ready


def _epoch(client: Client, component: str) -> int:
    """Of the one group of a pool; 0 while it has none."""
    workers = client.cluster_state().workers
    return max((one.epoch for one in workers if one.role == component and one.state == "ready"), default=0)


STEPS: dict[str, Callable[[Drill], dict[str, Any]]] = {
    f"{name} {component}": partial(step, component=component)
    for name, step, components in (
        ("scale", scale, ("decode", "prefill")),
        ("restart", restart, ("router", "directory", "prefill", "decode", "decode-0")),
        ("end", end_amid_a_stream, ("decode", "router")),
        ("kill", kill, ("decode",)),
    )
    for component in components
}
