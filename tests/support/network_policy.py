"""What NetworkPolicies allow between pods of one namespace; knows ports, pod selectors and nothing of addresses."""

from collections.abc import Mapping, Sequence
from typing import Any

from support.chart import Object

Labels = Mapping[str, str]


def matches(selector: Object, labels: Labels) -> bool:
    """Whether a label selector (matchLabels only) takes these labels; an empty one takes all.

    Raises:
        NotImplementedError: it has matchExpressions.
    """
    if "matchExpressions" in selector:
        raise NotImplementedError("matchExpressions")
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def allowed(
    policies: Sequence[Object], source: Labels | None, target: Labels | None, port: int, protocol: str = "TCP"
) -> bool:
    """Whether `source` may open `port` of `target`; None is somebody outside of the release."""
    leaves = source is None or _side(policies, "Egress", source, target, port, protocol)
    enters = target is None or _side(policies, "Ingress", target, source, port, protocol)
    return leaves and enters


def _side(
    policies: Sequence[Object], direction: str, here: Labels, there: Labels | None, port: int, protocol: str
) -> bool:
    """Without a policy for a pod and direction everything is allowed, with some what any of them allows."""
    ours = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], here)
    ]
    rules = [rule for spec in ours for rule in spec.get(direction.lower()) or []]
    return not ours or any(_rule(rule, direction, there, port, protocol) for rule in rules)


def _rule(rule: Object, direction: str, there: Labels | None, port: int, protocol: str) -> bool:
    peers: Any = rule.get("from" if direction == "Ingress" else "to")
    ports = rule.get("ports")
    fits = not ports or any(_fits(one, port, protocol) for one in ports)
    if not fits or not peers:
        return fits
    inside = [peer for peer in peers if "namespaceSelector" not in peer and "ipBlock" not in peer]
    return there is not None and any(matches(peer.get("podSelector", {}), there) for peer in inside)


def _fits(one: Object, port: int, protocol: str) -> bool:
    return (
        bool(one["port"] <= port <= one.get("endPort", one["port"]))
        and one.get("protocol", "TCP") == protocol
    )
