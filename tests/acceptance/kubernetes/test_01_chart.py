"""Must show 1: the chart holds its invariants over the whole product of values, and the images are in order."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import helm_python
import pytest

from support.chart import CHART_DIR, render
from support.chart_cases import CASES, product_of_values
from support.chart_invariants import INVARIANTS
from support.chart_monitoring import MONITORING_INVARIANTS
from support.must_show import MustShow

pytestmark = pytest.mark.acceptance


def test_matrix(must_show: MustShow) -> None:
    with must_show("1 chart: rendered, valid for Kubernetes, invariants") as figures:
        kinds: Counter[str] = Counter()
        invariants = (*INVARIANTS, *MONITORING_INVARIANTS)
        sets = [*CASES.items(), *product_of_values()]
        for name, values in sets:
            rendered = render(values)
            kinds.update(one["kind"] for one in rendered.objects)
            for invariant in invariants:
                try:
                    invariant(rendered)
                except AssertionError as error:
                    raise AssertionError(f"{name}: {invariant.__name__}: {error}") from error
        figures.append(f"{len(sets)} sets of values, {kinds.total()} objects of {len(kinds)} kinds")
        figures.append(f"{len(invariants)} invariants each")


def test_lint(must_show: MustShow) -> None:
    with must_show("1 chart: lint, strict") as figures:
        report = helm_python.lint(str(CHART_DIR), None, strict=True)
        assert report["errors"] == []
        figures.append(f"Helm {helm_python.helm_sdk_version()}, no error, no warning")


def test_images(must_show: MustShow, repo_root: Path) -> None:
    with must_show("1 images: pinned, non-root, commands resolve") as figures:
        script = [sys.executable, str(repo_root / "scripts" / "check_images.py")]
        run = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == 0, run.stdout
        figures.append(
            f"{len(list((repo_root / 'docker').glob('*.Dockerfile')))} Dockerfiles; not built here"
        )
