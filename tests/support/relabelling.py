"""What Prometheus makes of a pod's labels by relabelling rules; knows replacing and dropping, nothing of scraping."""

import re
from collections.abc import Mapping, Sequence

from support.chart import Object, Workload
from support.rank_commands import Process


def relabelled(rules: Sequence[Object], labels: Mapping[str, str]) -> dict[str, str]:
    """The labels after the rules, in order.

    Raises:
        NotImplementedError: a rule's action is none of replace and labeldrop.
    """
    result = dict(labels)
    for rule in rules:
        pattern = re.compile(rule.get("regex", "(.*)"))
        if rule.get("action") == "labeldrop":
            result = {name: value for name, value in result.items() if not pattern.fullmatch(name)}
        elif rule.get("action", "replace") == "replace":
            source = rule.get("separator", ";").join(result.get(name, "") for name in rule["sourceLabels"])
            if match := pattern.fullmatch(source):
                value = match.expand(rule.get("replacement", "$1").replace("$", "\\"))
                result[rule["targetLabel"]] = value
        else:
            raise NotImplementedError(rule["action"])
    return {name: value for name, value in result.items() if value}


def discovered(workload: Workload, process: Process) -> dict[str, str]:
    """What Kubernetes tells Prometheus of a container: its pod's labels, those that controllers add included."""
    labels = dict(workload.labels)
    if workload.object["kind"] == "StatefulSet":
        labels["apps.kubernetes.io/pod-index"] = str(process.config.rank)
    elif workload.object["kind"] == "LeaderWorkerSet":
        group = process.config.group.rpartition("-")[2]
        labels["leaderworkerset.sigs.k8s.io/group-index"] = group
        labels["leaderworkerset.sigs.k8s.io/worker-index"] = str(process.config.rank)
        # LeaderWorkerSets are made of StatefulSets: leaders are counted by group, the others by rank.
        labels["apps.kubernetes.io/pod-index"] = str(process.config.rank or group)
    meta = {f"pod_label_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}": value for name, value in labels.items()}
    meta |= {"pod_name": process.pod, "pod_container_name": process.container["name"]}
    return {f"__meta_kubernetes_{name}": value for name, value in meta.items()}
