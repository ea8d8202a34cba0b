"""The sets of values that the chart is rendered with: by name for `make test`, and a product for acceptance."""

import functools
from collections.abc import Iterator
from itertools import product
from typing import Any

from support.chart import Rendered, Values, example, render

PVC = {"source": "pvc", "pvc": {"claim": "models", "path": "m"}}
HUB = {
    "source": "download",
    "download": {"repo": "org/name", "revision": "abc123", "tokenSecret": {"name": "hub", "key": "token"}},
}
OUTER_REDIS = {"url": "redis://redis.databases:6380/3", "passwordSecret": {"name": "redis-auth"}}
TRIGGER = {
    "type": "prometheus",
    "metadata": {"serverAddress": "http://prometheus:9090", "query": "sum(up)", "threshold": "8"},
}
KEDA = {"kind": "keda", "min": 2, "max": 9, "triggers": [TRIGGER]}
PODS_METRIC = {
    "type": "Pods",
    "pods": {
        "metric": {"name": "sps2_kv_cache_usage_ratio"},
        "target": {"type": "AverageValue", "averageValue": "800m"},
    },
}
HPA = {"kind": "hpa", "min": 1, "max": 5, "targetCPU": 60}
GPU = {"enabled": True}
INGRESS = {"enabled": True, "className": "nginx", "host": "llm.example.com", "tlsSecret": "llm-tls"}
GRPC_ROUTE = {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["llm.example.com"]}
MONITORING = {
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True},
    "dashboard": {"enabled": True},
}


def pools(**pool: Any) -> dict[str, Any]:
    """The same for both pools."""
    return {"prefill": pool, "decode": pool}


CASES: dict[str, Values] = {
    "defaults": {},
    "no metrics": {"metrics": {"enabled": False}},
    "named scrapers": {
        "networkPolicy": {"scrapers": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}]}
    },
    "tenants": {
        "router": {
            "authTokens": {"secret": {"name": "tokens"}, "testToken": {"name": "test-token", "key": "t"}},
            "tenants": {"name": "limits", "key": "limits.txt"},
        }
    },
    "trial-cpu": example("trial-cpu"),
    "one-node-8-gpu": example("one-node-8-gpu"),
    "multi-node-rdma": example("multi-node-rdma"),
    "pods of four ranks": pools(groups=2, ranks=4),
    "pods of sixteen": pools(ranks=16),
    "one rank, lws": pools(groups=3, placement="lws"),
    "lws": pools(groups=2, ranks=4, placement="lws"),
    "statefulset": pools(groups=2, ranks=3, placement="statefulset"),
    "one rank, statefulset": pools(groups=4, placement="statefulset"),
    "mixed placements": {
        "prefill": {"ranks": 8, "placement": "lws"},
        "decode": {"groups": 2, "ranks": 2, "placement": "statefulset"},
    },
    "mesh": {
        "prefill": {"ranks": 4, "flags": {"tp": 2, "exchange": "kv"}},
        "decode": {"ranks": 4, "flags": {"tp": 4}},
    },
    "no prefill group": {"prefill": {"groups": 0}},
    "hpa of pods": {**pools(autoscaling=HPA), "router": {"autoscaling": HPA}},
    "hpa of lws": pools(ranks=2, placement="lws", autoscaling=HPA),
    "keda of pods": {**pools(ranks=2, autoscaling=KEDA), "router": {"autoscaling": KEDA}},
    "keda by signals": {
        **pools(ranks=2, autoscaling={"kind": "keda"}),
        "router": {"autoscaling": {"kind": "keda"}},
        "monitoring": {"prometheus": "https://prometheus.example.com/tenant"},
    },
    "hpa by metrics": pools(autoscaling={"kind": "hpa", "metrics": [PODS_METRIC]}),
    "keda of lws": pools(ranks=4, placement="lws", gpu=GPU, autoscaling=KEDA),
    "rdma": pools(
        ranks=2, placement="lws", gpu=GPU, rdma={"enabled": True, "resource": "rdma/ib", "count": 2}
    ),
    "pvc": {"model": PVC},
    "pvc root": {"model": {"source": "pvc", "name": "m", "pvc": {"claim": "models"}}},
    "download": {"model": HUB, **pools(gpu=GPU)},
    "download, hash": {"model": {**HUB, "hash": "0a" * 32}},
    "download, lws": {"model": {**HUB, "name": "other"}, **pools(ranks=2, placement="lws")},
    "outer redis": {"redis": OUTER_REDIS},
    "outer redis without password": {"redis": {"url": "rediss://redis"}},
    "own redis, given password": {"redis": {"passwordSecret": {"name": "given", "key": "pw"}}},
    "profiles": {"attention": {"file": '{"profiles": []}'}},
    "exact": {"attention": {"profile": "exact"}},
    "tls": {
        "tls": {"secret": "sps2-tls", "serverName": "sps2.internal"},
        "prefill": {"ranks": 4, "placement": "lws"},
        "decode": {"groups": 2, "ranks": 3},
        "router": {"flags": {"tls-client-certs": False}},
    },
    "tls, statefulset": {"tls": {"secret": "certs"}, **pools(ranks=2, placement="statefulset")},
    "ingress": {"router": {"ingress": INGRESS, "service": {"type": "LoadBalancer", "port": 443}}},
    "grpc route": {"router": {"grpcRoute": GRPC_ROUTE}},
    "no policies": {"networkPolicy": {"enabled": False}},
    "named clients": {
        "networkPolicy": {"clients": [{"namespaceSelector": {"matchLabels": {"team": "chat"}}}]}
    },
    "monitoring": {"monitoring": MONITORING},
    "monitoring of pods": {"monitoring": MONITORING, **pools(ranks=3)},
    "monitoring of sets": {
        "monitoring": MONITORING,
        "prefill": {"ranks": 2, "placement": "lws"},
        "decode": {"groups": 2, "ranks": 3, "placement": "statefulset"},
    },
    "tracing": {"tracing": {"otlpEndpoint": "http://collector.telemetry:14317", "sampleRatio": 0.125}},
    "no budgets": {
        part: {"pdb": {"enabled": False}} for part in ("router", "directory", "prefill", "decode")
    },
    "flags": {
        "router": {"flags": {"max-queued-tokens": 2_000_000, "reflection": True, "regroup-wait-s": 2.5}},
        "directory": {"flags": {"lease-ttl-s": 8, "log-level": "debug"}},
        **pools(flags={"kv-tokens": 10_000_000, "kv-transport": "grpc", "threads": 4, "reflection": False}),
    },
    "short times": {
        part: {"preStopSeconds": 0, "drainSeconds": 0.5, "graceSeconds": 0, "startupSeconds": 5}
        for part in ("router", "directory", "prefill", "decode")
    },
    "long times": {
        part: {"preStopSeconds": 30, "drainSeconds": 3600, "graceSeconds": 60}
        for part in ("router", "directory", "prefill", "decode")
    },
    "pod settings": {
        part: {
            "env": {"NCCL_DEBUG": "INFO", "UCX_TLS": "tcp", "LEVEL": 3},
            "envFrom": [{"secretRef": {"name": "more"}}],
            "nodeSelector": {"pool": "llm"},
            "tolerations": [{"key": "llm", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "spread": {"topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule"},
            "podLabels": {"team": "llm"},
            "podAnnotations": {"note": "1"},
            "priorityClassName": "high",
        }
        for part in ("router", "directory", "prefill", "decode")
    },
    "images": {
        "images": {
            "control": {"repository": "registry.example.com/sps2/control", "digest": f"sha256:{'a' * 64}"},
            "cpu": {"repository": "registry.example.com/sps2/cpu", "tag": "1.2.3"},
            "pullPolicy": "Always",
            "pullSecrets": ["registry"],
        }
    },
    "names": {
        "fullnameOverride": "a-very-long-name-that-is-longer-than-forty-characters",
        "nameOverride": "llm",
    },
    "no account": {"serviceAccount": {"create": False, "name": "given"}},
}
"""What `make test` renders."""


@functools.cache
def rendered_case(name: str) -> Rendered:
    """A rendering of CASES, made once; not to be changed."""
    return render(CASES[name])


def product_of_values() -> Iterator[tuple[str, Values]]:
    """Every placement with every model source, Redis, accelerator and autoscaler that it can have."""
    models: dict[str, Values] = {"image": {}, "pvc": PVC, "download": HUB}
    scalings: dict[str, Values] = {"none": {"kind": "none"}, "hpa": HPA, "keda": KEDA}
    flags = (False, True)
    cluster = product(models, ("own", "outer"), scalings, flags)
    pool_shapes = product(("pod", "lws", "statefulset"), (1, 2, 8), flags)
    for (source, redis, scaling, policies), (placement, ranks, gpu) in product(cluster, pool_shapes):
        if placement == "statefulset" and scaling != "none":
            continue  # refused
        pool = {
            "placement": placement,
            "ranks": ranks,
            "gpu": {"enabled": gpu},
            "autoscaling": scalings[scaling],
            "groups": 2,
            "rdma": {"enabled": gpu and ranks > 1},
        }
        name = f"{placement} {ranks} {source} {redis} gpu={gpu} {scaling} policies={policies}"
        values = {
            "model": models[source],
            "redis": OUTER_REDIS if redis == "outer" else {},
            "networkPolicy": {"enabled": policies},
            "monitoring": MONITORING if policies else {},
            **pools(**pool),
        }
        yield name, values
