"""What the dashboard shows, row by row, in the order in which an operator looks (docs/operating.md)."""

from scripts.chart.dashboard import Panel, Row
from scripts.chart.promql import grown, largest, quantile, quantiles, rate, select, total

FIRING = 'alertstate="firing"'
ROUTER = 'component="router"'
FAULTS = 'status=~"INTERNAL|UNKNOWN|DATA_LOSS|UNIMPLEMENTED"'
PODS = 'namespace="$namespace", pod=~"$release-.*"'

OVERVIEW = Row(
    "Overview",
    [
        Panel("Requests", "reqps", [(rate("sps2_requests_total"), "")], kind="stat"),
        Panel(
            "Failed",
            "percentunit",
            [
                (
                    f"({rate('sps2_requests_total', labels=FAULTS)} or vector(0)) / {rate('sps2_requests_total')}",
                    "",
                )
            ],
            kind="stat",
            description="INTERNAL, UNKNOWN, DATA_LOSS, UNIMPLEMENTED: the service's own faults.",
        ),
        Panel(
            "Refused for load",
            "percentunit",
            [(f"{rate('sps2_shed_total')} / {rate('sps2_requests_total')}", "")],
            kind="stat",
        ),
        Panel(
            "First token, p95", "s", [(quantile(0.95, "sps2_time_to_first_token_seconds"), "")], kind="stat"
        ),
        Panel(
            "Between tokens, p95",
            "s",
            [(quantile(0.95, "sps2_inter_token_latency_seconds"), "")],
            kind="stat",
        ),
        Panel(
            "Tokens out", "short", [(rate("sps2_generation_tokens_total", labels=ROUTER), "")], kind="stat"
        ),
        Panel(
            "Ready ranks",
            "short",
            [(largest("sps2_directory_workers", "role", 'state="ready"'), "{{role}}")],
            kind="stat",
        ),
        Panel(
            "Alerts that fire",
            "short",
            [(f"{total('ALERTS', labels=FIRING)} or vector(0)", "")],
            kind="stat",
        ),
    ],
    width=3,
    height=4,
)

REQUESTS = Row(
    "Requests",
    [
        Panel(
            "Ended, by status", "reqps", [(rate("sps2_requests_total", "status"), "{{status}}")], stacked=True
        ),
        Panel(
            "Ended, by finish reason",
            "reqps",
            [(rate("sps2_requests_total", "finish_reason"), "{{finish_reason}}")],
            stacked=True,
        ),
        Panel(
            "At routers",
            "short",
            [
                (total("sps2_num_requests_running", labels=ROUTER), "running"),
                (total("sps2_num_requests_waiting", labels=ROUTER), "waiting"),
            ],
            stacked=True,
        ),
        Panel(
            "Tokens a second",
            "short",
            [
                (rate("sps2_prompt_tokens_total"), "prompt"),
                (rate("sps2_generation_tokens_total", labels=ROUTER), "generated"),
                (rate("sps2_prefix_cache_hits_total"), "prompt, cached"),
            ],
        ),
        Panel("Refused for load", "reqps", [(rate("sps2_shed_total", "reason"), "{{reason}}")], stacked=True),
        Panel(
            "Failovers in 10 minutes",
            "short",
            [(grown("sps2_failovers_total", "10m", "stage"), "{{stage}}")],
            description="Failed attempts that were made again, before and after the client saw a token.",
        ),
    ],
)

LATENCY = Row(
    "Latency",
    [
        Panel("Time to first token", "s", quantiles("sps2_time_to_first_token_seconds")),
        Panel("Time between tokens", "s", quantiles("sps2_inter_token_latency_seconds")),
        Panel("Whole requests", "s", quantiles("sps2_e2e_request_latency_seconds")),
        Panel(
            "Where the time goes, p95",
            "s",
            [
                (quantile(0.95, f"sps2_request_{phase}_time_seconds"), phase)
                for phase in ("queue", "prefill", "transfer", "decode")
            ],
        ),
        Panel(
            "Queue of each router",
            "percentunit",
            [
                (
                    f"{total('sps2_waiting_tokens', 'pod')} / {total('sps2_queue_limit_tokens', 'pod')}",
                    "{{pod}}",
                )
            ],
            description="Prompt tokens that wait, of those that may.",
        ),
        Panel(
            "Tokens queued",
            "short",
            [
                (total("sps2_waiting_tokens"), "routers"),
                (total("sps2_prefill_queued_tokens", "group"), "{{group}}"),
            ],
        ),
    ],
)


def pool(component: str, *more: Panel) -> Row:
    """What both pools have, then `more`."""
    labels = f'component="{component}"'
    of_rank, rank = "group, rank", "{{group}}/{{rank}}"
    return Row(
        f"{component.capitalize()} pool",
        [
            Panel(
                "Requests of groups",
                "short",
                [
                    (total("sps2_num_requests_running", "group", labels), "{{group}} running"),
                    (total("sps2_num_requests_waiting", "group", labels), "{{group}} waiting"),
                ],
            ),
            Panel(
                "KV in use", "percentunit", [(largest("sps2_kv_cache_usage_ratio", of_rank, labels), rank)]
            ),
            Panel(
                "KV blocks", "short", [(total("sps2_kv_blocks", "state", labels), "{{state}}")], stacked=True
            ),
            Panel(
                "Engine steps a second", "short", [(rate("sps2_engine_steps_total", of_rank, labels), rank)]
            ),
            Panel(
                "Exposed communication",
                "percentunit",
                [(rate("sps2_exposed_communication_seconds_total", of_rank, labels), rank)],
                description="Share of the time that a rank waits for others while it computes nothing.",
            ),
            Panel(
                "Sent to other ranks of the group",
                "Bps",
                [(rate("sps2_collective_bytes_total", "kind", labels), "{{kind}}")],
                stacked=True,
            ),
            *more,
        ],
    )


PREFILL = pool(
    "prefill",
    Panel("Tokens computed a second", "short", [(rate("sps2_prefill_tokens_total", "group"), "{{group}}")]),
    Panel("KV sent to decode", "Bps", [(rate("sps2_kv_transfer_bytes_total", "group"), "{{group}}")]),
    Panel(
        "Prompts found cached",
        "percentunit",
        [(f"{rate('sps2_prefix_cache_hits_total')} / {rate('sps2_prefix_cache_queries_total')}", "tokens")],
    ),
    Panel(
        "Cached tokens fetched a second",
        "short",
        [(rate("sps2_prefix_fetched_tokens_total", "group"), "{{group}}")],
    ),
    Panel("Cached KV fetched", "Bps", [(rate("sps2_prefix_fetched_bytes_total", "group"), "{{group}}")]),
    Panel(
        "Prefix fetches",
        "reqps",
        [(rate("sps2_prefix_fetches_total", "result"), "{{result}}")],
        stacked=True,
    ),
)
DECODE = pool(
    "decode",
    Panel("Step", "s", quantiles("sps2_step_seconds", 'component="decode"')),
    Panel(
        "Tokens a second",
        "short",
        [(rate("sps2_generation_tokens_total", "group", 'component="decode"'), "{{group}}")],
    ),
    Panel(
        "Preemptions in 10 minutes", "short", [(grown("sps2_preemptions_total", "10m", "group"), "{{group}}")]
    ),
)

GROUPS = Row(
    "Groups and directory",
    [
        Panel(
            "Ranks, by state",
            "short",
            [(largest("sps2_directory_workers", "role, state"), "{{role}} {{state}}")],
        ),
        Panel(
            "Epochs and engines begun in 15 minutes",
            "short",
            [
                (f"max by (group) (changes({select('sps2_group_epoch', over='[15m]')}))", "{{group}} epochs"),
                (grown("sps2_engine_restarts_total", "15m", "group"), "{{group}} engines"),
            ],
        ),
        Panel(
            "Age of leases",
            "s",
            [(largest("sps2_lease_age_seconds", "group, rank"), "{{group}}/{{rank}}")],
            description="At 0.6 of a lease (3 s) its rank takes nothing new.",
        ),
        Panel(
            "Directory degraded",
            "short",
            [
                (largest("sps2_directory_state", "pod, state", 'state!="ok"'), "{{pod}} {{state}}"),
                (largest("sps2_directory_degraded", "pod"), "{{pod}} hears nothing"),
            ],
        ),
        Panel(
            "Calls of the directory, p99",
            "s",
            [(quantile(0.99, "sps2_directory_rpc_seconds", "method"), "{{method}}")],
        ),
        Panel(
            "Failed calls of the directory",
            "reqps",
            [(rate("sps2_directory_rpc_errors_total", "method, status"), "{{method}} {{status}}")],
        ),
        Panel(
            "What the directory holds",
            "short",
            [
                (largest("sps2_directory_requests"), "requests"),
                (largest("sps2_directory_prefixes"), "prefixes"),
                (total("sps2_directory_watchers"), "watchers"),
            ],
        ),
        Panel(
            "Leases that ended in 15 minutes",
            "short",
            [(grown("sps2_directory_leases_expired_total", "15m", "kind"), "{{kind}}")],
        ),
        Panel(
            "Versions",
            "short",
            [(total("sps2_build_info", "component, version"), "{{component}} {{version}}")],
        ),
    ],
)

PROCESSES = Row(
    "Processes and devices",
    [
        Panel("CPU cores", "short", [(rate("process_cpu_seconds_total", "pod"), "{{pod}}")]),
        Panel("Memory", "bytes", [(total("process_resident_memory_bytes", "pod"), "{{pod}}")]),
        Panel("Open files", "short", [(total("process_open_fds", "pod"), "{{pod}}")]),
        Panel(
            "GPU memory",
            "bytes",
            [(total("sps2_device_memory_used_bytes", "pod, device"), "{{pod}} {{device}}")],
        ),
        Panel(
            "GPU use",
            "percentunit",
            [(largest("sps2_device_utilization_ratio", "pod, device"), "{{pod}} {{device}}")],
        ),
        Panel(
            "Restarts of containers in 15 minutes",
            "short",
            [
                (
                    f"sum by (pod) (increase(kube_pod_container_status_restarts_total{{{PODS}}}[15m])) > 0",
                    "{{pod}}",
                )
            ],
            description="From kube-state-metrics.",
        ),
    ],
)

ROWS = (OVERVIEW, REQUESTS, LATENCY, PREFILL, DECODE, GROUPS, PROCESSES)
"""The whole dashboard."""
