# Ranks of both pools: supervisor and engine. Targets: cpu, cuda.
#   docker build -f docker/worker.Dockerfile --target cuda -t sps2/worker-cuda:0.1.0 .
ARG PYTHON_IMAGE=docker.io/library/python:3.11.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_ONLY_BINARY=:all: PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/sps2
ENV PATH=/opt/sps2/bin:$PATH
WORKDIR /src
COPY . .

FROM build AS build-cpu
# PyPI has the CUDA build only. What torch needs comes from PyPI with the rest: this index has few versions of that.
RUN pip install --no-deps --index-url https://download.pytorch.org/whl/cpu torch
RUN pip install ".[worker]" huggingface_hub

FROM build AS build-cuda
RUN pip install ".[worker]" huggingface_hub

FROM ${PYTHON_IMAGE} AS runtime
# Debian as it was on one day: what apt installs is pinned by that.
ARG DEBIAN_SNAPSHOT=20250203T000000Z
RUN rm -rf /etc/apt/sources.list.d \
    && echo "deb [check-valid-until=no] http://snapshot.debian.org/archive/debian/${DEBIAN_SNAPSHOT} bookworm main" \
        > /etc/apt/sources.list
# A compiler: Triton builds its launchers, and Inductor its CPU kernels, when an engine starts.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/sps2/bin:$PATH PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY models/demo /opt/sps2/models/demo
WORKDIR /tmp

FROM runtime AS cpu
COPY --from=build-cpu /opt/sps2 /opt/sps2
USER 10001:10001
# The supervisor is process 1: SIGTERM reaches it, it drains, and it reaps its engine.
ENTRYPOINT ["python", "-m"]
CMD ["sps2_prefill_worker", "--help"]

FROM runtime AS cuda
# User space of RDMA for the UCX that NIXL brings along. The driver's own libraries come from the container runtime.
RUN apt-get update && apt-get install -y --no-install-recommends ibverbs-providers libibverbs1 librdmacm1 \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/sps2 /opt/sps2
USER 10001:10001
ENTRYPOINT ["python", "-m"]
CMD ["sps2_prefill_worker", "--help"]
