# Serves a recipe's model with vLLM to learners elsewhere, on GPUs.
#   docker build -f docker/worker.Dockerfile -t rltrain:worker .
ARG BASE=python:3.11.13-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE}

# Triton compiles with gcc when a kernel first runs
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc=4:12.2.0-3 libc6-dev=2.36-9+deb12u14 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/rltrain
COPY requirements/run.txt requirements/run.txt
RUN python -m pip install --no-cache-dir vllm==0.32.0 torch==2.13.0 setuptools==84.2.1 -c requirements/run.txt \
    && python -m pip install --no-cache-dir --no-deps -r requirements/run.txt

COPY pyproject.toml README.md LICENSE ./
COPY rltrain rltrain
COPY reward reward
COPY recipes recipes
COPY docker/healthcheck.py docker/healthcheck.py
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation .

# models of the Hub are kept in /cache: mount it
RUN useradd --uid 10001 --create-home rltrain && install -d -o rltrain /runs /cache
USER 10001
WORKDIR /runs
ENV HF_HOME=/cache RLTRAIN_URL=http://127.0.0.1:8000

EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=900s \
    CMD ["python", "/opt/rltrain/docker/healthcheck.py", "worker"]
ENTRYPOINT ["rltrain", "worker"]
CMD ["--help"]
