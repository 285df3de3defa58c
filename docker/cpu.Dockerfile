# Trains with the embedded engine on a CPU: to try rltrain, and for small models.
#   docker build -f docker/cpu.Dockerfile -t rltrain:cpu .
ARG BASE=python:3.11.13-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE}

# torch.compile and DeepSpeed compile with gcc when they first run
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc=4:12.2.0-3 libc6-dev=2.36-9+deb12u14 \
    && rm -rf /var/lib/apt/lists/*

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/rltrain
COPY requirements/run.txt requirements/run.txt
RUN python -m pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" torch==2.13.0 setuptools==84.2.1 \
    && python -m pip install --no-cache-dir --no-deps -r requirements/run.txt

COPY pyproject.toml README.md LICENSE ./
COPY rltrain rltrain
COPY reward reward
COPY recipes recipes
COPY docker/healthcheck.py docker/healthcheck.py
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation .

# runs are written to /runs, models and data of the Hub are kept in /cache: mount both
RUN useradd --uid 10001 --create-home rltrain && install -d -o rltrain /runs /cache
USER 10001
WORKDIR /runs
ENV HF_HOME=/cache RLTRAIN_RUN=/runs/run RLTRAIN_SILENCE_SECONDS=3600

HEALTHCHECK --interval=60s --timeout=10s --start-period=1800s \
    CMD ["python", "/opt/rltrain/docker/healthcheck.py", "run"]
ENTRYPOINT ["rltrain"]
CMD ["--help"]
