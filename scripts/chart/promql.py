"""PromQL expressions of one release, for the dashboard; knows no metric by name."""

RELEASE = 'namespace="$namespace", release="$release"'
"""Selects the series of the release that is looked at."""
OVER = "[$__rate_interval]"


def select(metric: str, labels: str = "", over: str = "") -> str:
    """The series of a metric; `labels` are further matchers."""
    return f"{metric}{{{', '.join(filter(None, (RELEASE, labels)))}}}{over}"


def total(metric: str, by: str = "", labels: str = "") -> str:
    """Sum of a gauge."""
    return f"sum{_by(by)} ({select(metric, labels)})"


def largest(metric: str, by: str = "", labels: str = "") -> str:
    """The largest of a gauge."""
    return f"max{_by(by)} ({select(metric, labels)})"


def rate(metric: str, by: str = "", labels: str = "") -> str:
    """How much a counter grows each second."""
    return f"sum{_by(by)} (rate({select(metric, labels, OVER)}))"


def grown(metric: str, over: str, by: str = "", labels: str = "") -> str:
    """How much a counter grew in the time before."""
    return f"sum{_by(by)} (increase({select(metric, labels, f'[{over}]')}))"


def quantile(share: float, histogram: str, by: str = "", labels: str = "") -> str:
    """A quantile of a histogram."""
    le = ", ".join(filter(None, ("le", by)))
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', le, labels)})"


def quantiles(histogram: str, labels: str = "") -> list[tuple[str, str]]:
    """Median, 95th and 99th percentile, with legends."""
    return [(quantile(share, histogram, labels=labels), f"p{share * 100:.0f}") for share in (0.5, 0.95, 0.99)]


def _by(by: str) -> str:
    return f" by ({by})" if by else ""
