# Router, KV directory, command line and hub download: everything without torch.
#   docker build -f docker/control.Dockerfile -t sps2/control:0.1.0 .
# A tag can be moved; where that matters: --build-arg PYTHON_IMAGE=...@sha256:DIGEST
ARG PYTHON_IMAGE=docker.io/library/python:3.11.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Wheels only: there is no compiler here, and nothing of others' runs while this is built.
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_ONLY_BINARY=:all: PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/sps2
ENV PATH=/opt/sps2/bin:$PATH
WORKDIR /src
COPY . .
RUN pip install ".[router,cli]"

FROM ${PYTHON_IMAGE} AS control
ENV PATH=/opt/sps2/bin:$PATH PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY --from=build /opt/sps2 /opt/sps2
COPY models/demo /opt/sps2/models/demo
WORKDIR /tmp
USER 10001:10001
# The service is process 1: SIGTERM reaches it, and it drains.
ENTRYPOINT ["python", "-m"]
CMD ["sps2_router", "--help"]
