"""What must hold of every rendering, one function each; they raise AssertionError."""

import re
from collections import defaultdict
from collections.abc import Callable
from itertools import combinations

from sps2_service.server import LIVENESS
from support.chart import Object, Rendered, Workload
from support.kube_schemas import NEWEST, OLDEST, errors
from support.network_policy import allowed, matches
from support.rank_commands import Process, module_exists, processes

STOPPING_S = 15
"""What a stop takes beside preStop, drain and grace: resisting tasks, the engine, leaving the group."""
PORTS = {"router": 50051, "directory": 50060, "prefill": 50070, "decode": 50080, "redis": 6379}
METRICS_PORT = 9090
FREE_PORT = 43210
"""Stands for the ports that collectives and transfers take."""
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|API_KEY|CREDENTIAL")


def kubernetes_takes_it(rendered: Rendered) -> None:
    found = [
        f"{one['kind']}/{one['metadata']['name']} in {version}: {error}"
        for one in rendered.objects
        for version in (OLDEST, NEWEST)
        for error in errors(one, version)
    ]
    assert found == []


def names_are_unique_and_short(rendered: Rendered) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in rendered.objects]
    assert len(set(names)) == len(names)
    # Pods of a LeaderWorkerSet and a StatefulSet append numbers, and a pod's name is a DNS label.
    assert all(len(name) <= 63 - len("-99-99") for _, name in names)


def kubelet_waits_longer_than_the_drain(rendered: Rendered) -> None:
    for workload in rendered.workloads:
        for process in _processes(workload):
            sleep = (
                process.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            )
            least = sleep + process.config.drain_s + process.config.grace_s + STOPPING_S
            assert workload.spec["terminationGracePeriodSeconds"] > least, workload.name


def selectors_find_their_pods(rendered: Rendered) -> None:
    for workload in rendered.workloads:
        if workload.object["kind"] in {"Deployment", "StatefulSet"}:
            assert matches(workload.object["spec"]["selector"], workload.labels), workload.name
            assert workload.object["spec"]["selector"]["matchLabels"], workload.name
    apps = [one for one in rendered.workloads if one.object["kind"] in {"Deployment", "StatefulSet"}]
    for first, second in combinations(apps, 2):
        assert not matches(first.object["spec"]["selector"], second.labels), (first.name, second.name)
    for one in rendered.of("Service"):
        _of_one_component(rendered, {"matchLabels": one["spec"]["selector"]}, one)
    for one in rendered.of("PodDisruptionBudget"):
        _of_one_component(rendered, one["spec"]["selector"], one)
    for one in rendered.of("NetworkPolicy"):
        _of_one_component(rendered, one["spec"]["podSelector"], one)


def services_lead_to_ports_that_are_listened_on(rendered: Rendered) -> None:
    for one in rendered.of("Service"):
        for workload in rendered.workloads:
            if not matches({"matchLabels": one["spec"]["selector"]}, workload.labels):
                continue
            named = {
                port["name"]: port["containerPort"]
                for c in workload.containers
                for port in c.get("ports", [])
            }
            for port in one["spec"]["ports"]:
                assert named[port["targetPort"]] == PORTS[workload.component]


def flags_are_those_of_the_services(rendered: Rendered) -> None:
    for workload in rendered.workloads:
        for process in _processes(workload):
            assert module_exists(process.container["command"][2])
            host, _, _ = process.config.listen.rpartition(":")
            assert host in {"0.0.0.0", process.ip}
            listened_on = dict.fromkeys((process.port, process.probe_port, *process.metrics_ports))
            assert [port["containerPort"] for port in process.container["ports"]] == [*listened_on]
    for component, port in PORTS.items():
        for workload in rendered.part(component):
            assert [p.port for p in _processes(workload)][:1] in ([port], [])


def ranks_find_each_other(rendered: Rendered) -> None:
    for component in ("prefill", "decode"):
        groups: dict[str, list[Process]] = defaultdict(list)
        for workload in rendered.part(component):
            for process in _processes(workload):
                groups[process.config.group].append(process)
        size = int(rendered.values[component]["ranks"])
        for name, members in groups.items():
            assert sorted(one.config.rank for one in members) == list(range(size)), name
            assert {one.config.group_size for one in members} == {size}
            (leader,) = [one for one in members if one.config.rank == 0]
            for one in members:
                # Each is told to others by its pod's address, and engines bind to it.
                assert one.config.listen == f"{one.ip}:{one.port}"
                # A container beside the leader reaches it by the pod's own address, a pod by the leader's name.
                targets = {f"{leader.ip}:{leader.port}", f"{leader.address}:{leader.port}"}
                assert size == 1 or one.config.leader in targets, (one.config.leader, targets)


def everyone_finds_the_directory_and_redis(rendered: Rendered) -> None:
    models = set()
    for workload in rendered.workloads:
        for process in _processes(workload):
            if workload.component == "directory":
                own = not rendered.values["redis"]["url"]
                host = process.config.redis.split("//")[1].partition(":")[0]
                assert not own or rendered.named("Service", host)
                assert own or process.config.redis == rendered.values["redis"]["url"]
            else:
                host, _, port = process.config.directory.rpartition(":")
                service = rendered.named("Service", host)
                assert [one["port"] for one in service["spec"]["ports"]] == [int(port)]
                models.add((str(process.config.model), process.config.model_name))
    assert len(models) == 1


def routers_with_a_hash_fetch_no_weights(rendered: Rendered) -> None:
    given = rendered.values["model"]["hash"]
    for workload in rendered.workloads:
        for process in _processes(workload):
            if workload.component == "router":
                assert process.config.model_hash == given
        for container in workload.spec.get("initContainers", []):
            left_out = "--exclude=*.safetensors" in container["args"]
            assert left_out == (bool(given) and workload.component == "router"), workload.name


def policies_cover_every_port(rendered: Rendered) -> None:
    policies = rendered.of("NetworkPolicy")
    labels = {one.component: one.labels for one in rendered.workloads}
    calls = [
        ("router", "directory", PORTS["directory"]),
        ("router", "prefill", PORTS["prefill"]),
        ("router", "decode", PORTS["decode"]),
        ("prefill", "directory", PORTS["directory"]),
        ("decode", "directory", PORTS["directory"]),
        ("test", "router", PORTS["router"]),
        *[(one, two, FREE_PORT) for one in ("prefill", "decode") for two in ("prefill", "decode")],
    ]
    if "redis" in labels:
        calls.append(("directory", "redis", PORTS["redis"]))
    for source, target, port in calls:
        assert allowed(policies, labels[source], labels[target], port), (source, target, port)
    for one in rendered.of("NetworkPolicy"):
        name = one["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        if name != "redis":
            assert allowed(policies, labels[name], None, 53, "UDP"), f"{name} cannot resolve names"
    if rendered.values["redis"]["url"]:
        given = re.search(r":(\d+)(/|$)", rendered.values["redis"]["url"])
        assert allowed(policies, labels["directory"], None, int(given[1]) if given else 6379)
    for workload in rendered.workloads:
        if "initContainers" in workload.spec:
            assert allowed(policies, workload.labels, None, 443), f"{workload.name} cannot download"


def traces_reach_their_collector(rendered: Rendered) -> None:
    tracing, policies = rendered.values["tracing"], rendered.of("NetworkPolicy")
    endpoint = tracing["otlpEndpoint"]
    port = int(endpoint.rstrip("/").rpartition(":")[2]) if endpoint else 4317
    for workload in rendered.workloads:
        for process in _processes(workload):
            assert process.config.otlp_endpoint == endpoint
            assert process.config.trace_sample_ratio == (tracing["sampleRatio"] if endpoint else 1)
        if endpoint and policies and workload.component in {"router", "prefill", "decode"}:
            assert allowed(policies, workload.labels, None, port), f"{workload.name} cannot export"


def policies_open_nothing_else(rendered: Rendered) -> None:
    policies = rendered.of("NetworkPolicy")
    if not policies:
        return
    labels = {one.component: one.labels for one in rendered.workloads}
    closed = [("directory", PORTS["directory"]), ("prefill", PORTS["prefill"]), ("decode", FREE_PORT)]
    # The kubelet of a node reaches its pods whatever policies say.
    closed += [("directory", PORTS["directory"] + 1000), ("decode", PORTS["decode"] + 1000)]
    for target, port in closed:
        assert not allowed(policies, None, labels[target], port), target
        assert not allowed(policies, labels["test"], labels[target], port), target
    scraper = {"app": "prometheus"}
    named = rendered.values["networkPolicy"]["scrapers"] != [{"namespaceSelector": {}}]
    for target in ("router", "directory", "prefill", "decode"):
        assert not allowed(policies, None, labels[target], METRICS_PORT), target
        may_read = named and rendered.values["metrics"]["enabled"]
        assert allowed(policies, scraper, labels[target], METRICS_PORT) == may_read, target
    assert not allowed(policies, labels["router"], labels["decode"], FREE_PORT)
    assert not allowed(policies, labels["router"], None, 6379)
    if "redis" in labels:
        for source in ("router", "prefill", "decode", "test"):
            assert not allowed(policies, labels[source], labels["redis"], PORTS["redis"]), source
    if not rendered.values["networkPolicy"]["clients"]:
        assert allowed(policies, None, labels["router"], PORTS["router"])
    else:
        assert not allowed(policies, None, labels["router"], PORTS["router"])


def containers_are_confined(rendered: Rendered) -> None:
    for workload in rendered.workloads:
        spec = workload.spec
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"]
        assert pod["runAsUser"] > 0
        assert pod["seccompProfile"]["type"] == "RuntimeDefault"
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert not any("hostPath" in volume for volume in spec["volumes"])
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "@sha256:" in container["image"] or re.search(r":[\w.-]*\d[\w.-]*$", container["image"])
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["cpu"]
            mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
            assert mounts["tmp"]["mountPath"] == "/tmp"  # noqa: S108 - the one place that may be written
            assert mounts.keys() <= {volume["name"] for volume in spec["volumes"]}


def probes_ask_where_it_listens(rendered: Rendered) -> None:
    for workload in rendered.workloads:
        for process in _processes(workload):
            container = process.container
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                assert container[kind]["grpc"]["port"] == process.probe_port, (workload.name, kind)
            # A rank that waits for its group lives, but is not ready.
            assert container["livenessProbe"]["grpc"]["service"] == LIVENESS
            assert container["startupProbe"]["grpc"]["service"] == LIVENESS
            assert "service" not in container["readinessProbe"]["grpc"]


def tls_is_everywhere_or_nowhere(rendered: Rendered) -> None:
    tls = rendered.values["tls"]
    for workload in rendered.workloads:
        volumes = [volume["secret"] for volume in workload.spec["volumes"] if volume["name"] == "tls"]
        if workload.component == "redis":
            assert not volumes
            continue
        assert [volume["secretName"] for volume in volumes] == [tls["secret"]] * bool(tls["secret"])
        for process in _processes(workload):
            config = process.config
            assert (config.tls is not None) == bool(tls["secret"]) == bool(config.health_port), workload.name
            assert config.tls_server_name == (tls["serverName"] if tls["secret"] else "")
            assert config.health_port != process.port
        if workload.component == "test":
            names = {entry["name"] for one in workload.containers for entry in one["env"]}
            assert ({"SPS2_TLS_CA", "SPS2_TLS_CERT", "SPS2_TLS_KEY"} <= names) == bool(tls["secret"])
    for one in rendered.of("Service"):
        protocols = {port.get("appProtocol") for port in one["spec"]["ports"]} - {None}
        assert protocols <= {"https" if tls["secret"] else "kubernetes.io/h2c"}


def autoscalers_rule_alone(rendered: Rendered) -> None:
    scaled = {}
    for one in rendered.of("HorizontalPodAutoscaler", "ScaledObject"):
        target = one["spec"]["scaleTargetRef"]
        scaled[target["kind"], target["name"]] = one
        assert rendered.named(target["kind"], target["name"])["apiVersion"] == target["apiVersion"]
    for workload in rendered.workloads:
        key = workload.object["kind"], workload.object["metadata"]["name"]
        if workload.object["kind"] != "Pod":
            assert ("replicas" in workload.object["spec"]) == (key not in scaled), workload.name
    wanted = [
        part
        for part in ("router", "prefill", "decode")
        if rendered.values[part]["autoscaling"]["kind"] != "none"
    ]
    assert len(scaled) == len(wanted)


def secrets_come_by_reference(rendered: Rendered) -> None:
    made = {one["metadata"]["name"] for one in rendered.of("Secret")}
    given = {
        rendered.values["redis"]["passwordSecret"]["name"],
        rendered.values["model"]["download"]["tokenSecret"]["name"],
        rendered.values["router"]["authTokens"]["testToken"]["name"],
    }
    for workload in rendered.workloads:
        for container in [*workload.spec.get("initContainers", []), *workload.containers]:
            for entry in container.get("env", []):
                if SECRET_NAME.search(entry["name"]):
                    assert "value" not in entry, entry["name"]
                    assert entry["valueFrom"]["secretKeyRef"]["name"] in made | given
            assert not any(
                "password" in argument.lower() for argument in container["args"] if argument[0] == "-"
            )
    for one in rendered.of("Secret"):
        for value in one["data"].values():
            others = [str(other) for other in rendered.objects if other is not one]
            assert not any(value in other for other in others)


def references_lead_somewhere(rendered: Rendered) -> None:
    for workload in rendered.workloads:
        account = workload.spec["serviceAccountName"]
        assert not rendered.values["serviceAccount"]["create"] or rendered.named("ServiceAccount", account)
        for volume in workload.spec["volumes"]:
            if "configMap" in volume and volume["name"] != "tenants":  # which is the operator's own
                assert rendered.named("ConfigMap", volume["configMap"]["name"])
        if workload.object["kind"] == "StatefulSet":
            assert rendered.named("Service", workload.object["spec"]["serviceName"])
    for one in rendered.of("Ingress"):
        backend = one["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
        ports = rendered.named("Service", backend["name"])["spec"]["ports"]
        assert backend["port"]["name"] in {port["name"] for port in ports}
    for one in rendered.of("GRPCRoute"):
        backend = one["spec"]["rules"][0]["backendRefs"][0]
        ports = rendered.named("Service", backend["name"])["spec"]["ports"]
        assert backend["port"] in {port["port"] for port in ports}


def tokens_and_tenants_are_mounted(rendered: Rendered) -> None:
    given = rendered.values["router"]
    wanted = [
        ("auth_tokens", given["authTokens"]["secret"], "secret", "secretName"),
        ("tenants", given["tenants"], "configMap", "name"),
    ]
    for workload in rendered.part("router"):
        volumes = {volume["name"]: volume for volume in workload.spec["volumes"]}
        for process in _processes(workload):
            mounts = {one["mountPath"]: one for one in process.container["volumeMounts"]}
            assert not any("subPath" in one for one in mounts.values()), "such a file never changes"
            for field, reference, kind, name in wanted:
                path = getattr(process.config, field)
                assert (path is not None) == bool(reference["name"]), field
                if path is not None:
                    source = volumes[mounts[str(path.parent)]["name"]][kind]
                    assert (source[name], path.name) == (reference["name"], reference["key"])
    for workload in rendered.part("test"):
        (container,) = workload.containers
        names = {entry["name"] for entry in container["env"]}
        assert ("SPS2_TOKEN" in names) == bool(given["authTokens"]["testToken"]["name"])


def each_rank_has_its_devices(rendered: Rendered) -> None:
    for component in ("prefill", "decode"):
        pool = rendered.values[component]
        for workload in rendered.part(component):
            assert len(workload.services) == (pool["ranks"] if pool["placement"] == "pod" else 1)
            for process in _processes(workload):
                limits = process.container["resources"]["limits"]
                assert (limits.get(pool["gpu"]["resource"]) == 1) == pool["gpu"]["enabled"]
                assert process.config.device == ("cuda" if pool["gpu"]["enabled"] else "cpu")
                assert (pool["rdma"]["resource"] in limits) == pool["rdma"]["enabled"]


def budgets_let_one_group_go(rendered: Rendered) -> None:
    for component in ("prefill", "decode"):
        pool = rendered.values[component]
        if pool["pdb"]["enabled"]:
            (budget,) = [
                one
                for one in rendered.of("PodDisruptionBudget")
                if one["metadata"]["name"].endswith(component)
            ]
            pods = 1 if pool["placement"] == "pod" else pool["ranks"]
            assert budget["spec"]["maxUnavailable"] == pods * pool["pdb"]["maxUnavailableGroups"]


INVARIANTS: tuple[Callable[[Rendered], None], ...] = (
    kubernetes_takes_it,
    names_are_unique_and_short,
    kubelet_waits_longer_than_the_drain,
    selectors_find_their_pods,
    services_lead_to_ports_that_are_listened_on,
    flags_are_those_of_the_services,
    ranks_find_each_other,
    everyone_finds_the_directory_and_redis,
    routers_with_a_hash_fetch_no_weights,
    policies_cover_every_port,
    traces_reach_their_collector,
    policies_open_nothing_else,
    containers_are_confined,
    probes_ask_where_it_listens,
    tls_is_everywhere_or_nowhere,
    autoscalers_rule_alone,
    secrets_come_by_reference,
    references_lead_somewhere,
    tokens_and_tenants_are_mounted,
    each_rank_has_its_devices,
    budgets_let_one_group_go,
)


def _processes(workload: Workload) -> list[Process]:
    return list(processes(workload))


def _of_one_component(rendered: Rendered, selector: Object, owner: Object) -> None:
    found = {one.component for one in rendered.workloads if matches(selector, one.labels)}
    assert len(found) == 1, f"{owner['kind']}/{owner['metadata']['name']} selects {found}"
