# Pagoda's image. Targets: `cpu` (the default) and `cuda`.
#   docker build -t pagoda .
#   docker build -t pagoda:cuda --target cuda .
#   docker build -t pagoda --build-arg TORCH_LOCK=torch-cpu.lock --build-arg PIP_ARGS="--extra-index-url …" .    torch without CUDA
#   docker run --read-only --tmpfs /tmp -v pagoda-cache:/cache -p 8080:8080 -p 8081:8081 pagoda
# The base by its digest, which `make pin-base-image` renews.
ARG BASE_IMAGE=python:3.11-slim@sha256:45037981b62b34b44602584fccbc4d884d5f7dc92c7ee86bb38a698a79fe1e51

FROM ${BASE_IMAGE} AS build
ARG PIP_ARGS=""
ARG TORCH_LOCK=torch.lock
# All that comes from an index has its hash in a lock file, and pip looks for nothing else: no dependency, nothing to build with.
ARG LOCKED="--require-hashes --no-deps --no-build-isolation"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /src
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/pagoda && python3 -m venv /opt/tools
COPY requirements requirements
# torch first and alone: the layer stays when only Pagoda's own files change.
RUN /opt/pagoda/bin/pip install ${LOCKED} ${PIP_ARGS} --requirement requirements/${TORCH_LOCK}
RUN /opt/pagoda/bin/pip install ${LOCKED} ${PIP_ARGS} --requirement requirements/image.lock \
    && /opt/tools/bin/pip install ${LOCKED} ${PIP_ARGS} --requirement requirements/tools.lock
COPY pyproject.toml README.md LICENSE ./
COPY runtime runtime
COPY kernels kernels
# The C++ kernels go into the package: the image that runs has no compiler for them. The SBOM is of what is installed.
RUN /opt/pagoda/bin/pip install --no-deps --no-build-isolation . \
    && /opt/pagoda/bin/pip check \
    && /opt/pagoda/bin/python -m pagoda_kernels.cpu.build \
    && /opt/tools/bin/cyclonedx-py environment --output-reproducible --output-file /opt/pagoda/sbom.cdx.json /opt/pagoda/bin/python

FROM ${BASE_IMAGE} AS runtime
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="pagoda" \
      org.opencontainers.image.description="LLM serving runtime for Kubernetes: a KServe predictor around its own engine" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Group 0 owns the cache: any user id works. Official images hold Python's library uncompiled, a second for every process.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --gid 0 --no-create-home --home-dir /cache --shell /usr/sbin/nologin pagoda \
    && mkdir /cache && chown 10001:0 /cache && chmod 2775 /cache \
    && python3 -m compileall -q -x '/tests?/' "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
ENV PATH=/opt/pagoda/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton
# Python takes the working directory for temporary files where /tmp cannot be written.
WORKDIR /cache
VOLUME /cache
EXPOSE 8080 8081
USER 10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 CMD ["pagoda", "probe", "ready"]
ENTRYPOINT ["pagoda"]
CMD ["serve"]

FROM runtime AS cuda
# Triton compiles a small launcher in C for each kernel, once.
USER root
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build /opt/pagoda /opt/pagoda

FROM runtime AS cpu
COPY --from=build /opt/pagoda /opt/pagoda
