"""The images, as far as they can be checked without building them."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from support.chart_cases import CASES, rendered_case

GOOD = """
ARG BASE=python:3.11.11-slim
FROM ${BASE} AS build
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_ONLY_BINARY=:all:
COPY . .
RUN pip install ".[router]" tool==1.0.0 huggingface_hub
FROM ${BASE}
ENV PYTHONDONTWRITEBYTECODE=1
COPY --from=build /opt /opt
COPY models/demo /models/demo
WORKDIR /tmp
USER 10001:10001
ENTRYPOINT ["python", "-m"]
CMD ["sps2_router"]
"""


BAD = [
    ("python:3.11.11-slim", "python:3.11-slim", "not pinned"),
    ("python:3.11.11-slim", "python:latest", "not pinned"),
    ("models/demo", "models/none", "does not exist"),
    ("COPY models/demo", "COPY tests/conftest.py", "not in the build context"),
    ("--from=build", "--from=built", "no such stage"),
    ("tool==1.0.0", "tool", "tool has no version"),
    ("PIP_CONSTRAINT", "PIP_OTHER", "no PIP_CONSTRAINT"),
    ("PIP_ONLY_BINARY=:all:", "PIP_ONLY_BINARY=torch", "no PIP_ONLY_BINARY"),
    ("WORKDIR /tmp", "WORKDIR /srv", "WORKDIR must be /tmp"),
    ("PYTHONDONTWRITEBYTECODE=1", "A=1", "no PYTHONDONTWRITEBYTECODE"),
    ("COPY --from=build /opt /opt", "RUN pip install a==1", "is built where it runs"),
    ("FROM ${BASE}\n", "FROM build\n", "is built where it runs"),
    ("RUN pip", "RUN apt-get install -y gcc && pip", "snapshot"),
    ("USER 10001:10001", "USER root", "USER root"),
    ("USER 10001:10001", "", "USER is missing"),
    ('"sps2_router"', '"sps2_rooter"', "no such service"),
    ('["python", "-m"]', "python -m", "ENTRYPOINT"),
    ("ENV PIP", "ENV HF_TOKEN=x PIP", "a secret"),
    ("COPY . .", "ADD https://example.com/x .", "ADD"),
]
"""What is replaced in the good one, by what, and a part of what the check then says."""


def check(repo_root: Path, *files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo_root / "scripts" / "check_images.py"), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


def test_ours_are_in_order(repo_root: Path) -> None:
    run = check(repo_root)
    assert run.returncode == 0, run.stdout


def test_a_bad_one_is_found_out(repo_root: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_text(GOOD)
    bad = [tmp_path / f"bad{number}" for number in range(len(BAD))]
    for path, (old, new, _) in zip(bad, BAD, strict=True):
        path.write_text(GOOD.replace(old, new))
    run = check(repo_root, good, *bad)
    assert run.returncode == 1
    assert run.stderr == ""
    assert "good:" not in run.stdout
    for path, (_, _, problem) in zip(bad, BAD, strict=True):
        said = [line for line in run.stdout.splitlines() if line.startswith(f"{path.name}:")]
        assert any(problem in line for line in said), (path.name, problem, said)


def test_commands_of_the_chart_are_installed() -> None:
    """Those that are no `python -m`: console scripts of what the images hold, and the Redis image's shell."""
    scripts = {script.name for script in metadata.entry_points(group="console_scripts")}
    for name in CASES:
        for workload in rendered_case(name).workloads:
            for container in [*workload.spec.get("initContainers", []), *workload.containers]:
                program = container["command"][0]
                assert program in scripts | {"python"} or (workload.component, program) == ("redis", "sh")
