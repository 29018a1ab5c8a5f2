# Three images of one tree: `gateway`, `worker` (CPU) and `worker-cuda`. docs/containers.md says how to build and run them.
#
# - Builders install everything by hash from requirements/*.lock. The images contain neither pip nor a compiler.
# - They run as user 65532 on a read-only root, and write only to /var/lib/lacre and /tmp.
# - Layers that change least come first: base, packages, the project's own code.
ARG BASE_IMAGE=python:3.12-slim
ARG CUDA_BUILD_IMAGE=nvidia/cuda:12.9.1-devel-ubuntu24.04
ARG CUDA_IMAGE=nvidia/cuda:12.9.1-runtime-ubuntu24.04

# --- builders ---------------------------------------------------------------------------------------------------------

FROM ${BASE_IMAGE} AS tools
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_ROOT_USER_ACTION=ignore
COPY requirements/build.lock requirements/
RUN python3 -m venv /tools && /tools/bin/pip install --require-hashes --no-deps -r requirements/build.lock
COPY tools/slim.py tools/

# The project's two wheels: Python alone, the same for every image.
FROM tools AS project
COPY LICENSE README.md pyproject.toml ./
COPY policies policies
COPY sdk sdk
COPY fabric fabric
COPY gateway gateway
COPY backend backend
RUN /tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist ./sdk .

FROM tools AS gateway-packages
COPY requirements/gateway.lock requirements/
RUN python3 -m venv --without-pip /opt/lacre \
    && /tools/bin/pip --python /opt/lacre/bin/python install --require-hashes --no-deps --only-binary :all: \
       -r requirements/gateway.lock \
    && python3 tools/slim.py /opt/lacre

# The project gets its own tree, and so its own layer over the packages.
FROM gateway-packages AS gateway-project
COPY --from=project /dist /dist
RUN /tools/bin/pip --python /opt/lacre/bin/python install --no-deps --no-index --prefix /own/opt/lacre /dist/*.whl \
    && python3 tools/slim.py /own && mkdir -p /own/var/lib/lacre

FROM tools AS worker-packages
COPY requirements/worker.lock requirements/
RUN python3 -m venv --without-pip /opt/lacre \
    && /tools/bin/pip --python /opt/lacre/bin/python install --require-hashes --no-deps --only-binary :all: \
       -r requirements/worker.lock \
    && python3 tools/slim.py /opt/lacre

# llama.cpp with a kernel library for each generation of x86-64 or Arm. It loads the machine's own at the start.
# A mounted wheel in /wheels is used unchanged. Without one, llama.cpp is compiled, which takes some minutes.
FROM worker-packages AS llama
ARG CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON -DCMAKE_INSTALL_BINDIR=llama_cpp/lib"
COPY requirements/native.lock requirements/
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 \
    && if ! ls /wheels/llama_cpp_python-*.whl; then apt-get install -y --no-install-recommends build-essential; fi \
    && rm -rf /var/lib/apt/lists/*
RUN mkdir /llama \
    && if ls /wheels/llama_cpp_python-*.whl; then cp /wheels/llama_cpp_python-*.whl /llama; else \
       PATH="/tools/bin:$PATH" CMAKE_ARGS="${CMAKE_ARGS}" /tools/bin/pip wheel --require-hashes --no-deps --no-build-isolation \
       --no-binary llama-cpp-python -r requirements/native.lock --wheel-dir /llama; fi \
    && /tools/bin/pip --python /opt/lacre/bin/python install --no-deps --no-index --prefix /engine/opt/lacre /llama/*.whl \
    && cp /usr/lib/*/libgomp.so.1 /engine/opt/lacre/lib/python3*/site-packages/llama_cpp/lib/ \
    && python3 tools/slim.py /engine

FROM worker-packages AS worker-project
COPY --from=project /dist /dist
RUN /tools/bin/pip --python /opt/lacre/bin/python install --no-deps --no-index --prefix /own/opt/lacre /dist/*.whl \
    && python3 tools/slim.py /own && mkdir -p /own/var/lib/lacre

# The same for CUDA, on the Python of NVIDIA's images.
FROM ${CUDA_BUILD_IMAGE} AS cuda
WORKDIR /src
ARG CUDA_CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_CUDA=on -DGGML_NATIVE=OFF"
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_ROOT_USER_ACTION=ignore
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends build-essential python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY requirements/build.lock requirements/native.lock requirements/worker.lock requirements/
COPY tools/slim.py tools/
RUN python3 -m venv /tools && /tools/bin/pip install --require-hashes --no-deps -r requirements/build.lock \
    && python3 -m venv --without-pip /opt/lacre \
    && /tools/bin/pip --python /opt/lacre/bin/python install --require-hashes --no-deps --only-binary :all: \
       -r requirements/worker.lock \
    && python3 tools/slim.py /opt/lacre
# The driver's library is the host's. A stub here lets the linker find it.
RUN mkdir /llama \
    && if ls /wheels/llama_cpp_python-*.whl; then cp /wheels/llama_cpp_python-*.whl /llama; else \
       ln -s libcuda.so /usr/local/cuda/lib64/stubs/libcuda.so.1; \
       PATH="/tools/bin:$PATH" CMAKE_ARGS="${CUDA_CMAKE_ARGS}" LDFLAGS="-Wl,-rpath-link,/usr/local/cuda/lib64/stubs" \
       /tools/bin/pip wheel --require-hashes --no-deps --no-build-isolation --no-binary llama-cpp-python \
       -r requirements/native.lock --wheel-dir /llama; fi \
    && /tools/bin/pip --python /opt/lacre/bin/python install --no-deps --no-index --prefix /engine/opt/lacre /llama/*.whl \
    && cp /usr/lib/*/libgomp.so.1 /engine/opt/lacre/lib/python3*/site-packages/llama_cpp/lib/ \
    && python3 tools/slim.py /engine
COPY --from=project /dist /dist
RUN /tools/bin/pip --python /opt/lacre/bin/python install --no-deps --no-index --prefix /own/opt/lacre /dist/*.whl \
    && python3 tools/slim.py /own && mkdir -p /own/var/lib/lacre

# --- images -----------------------------------------------------------------------------------------------------------

FROM ${BASE_IMAGE} AS gateway
ARG VERSION=0 REVISION=unknown
LABEL org.opencontainers.image.title="Lacre gateway" \
      org.opencontainers.image.description="Decides, counts and routes sealed requests, and can read none of them" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH="/opt/lacre/bin:$PATH" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY --from=gateway-packages /opt/lacre /opt/lacre
COPY --from=gateway-project --chown=65532:65532 /own/var/lib/lacre /var/lib/lacre
COPY --from=gateway-project /own/opt/lacre /opt/lacre
USER 65532:65532
WORKDIR /var/lib/lacre
EXPOSE 8321
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["/opt/lacre/bin/python", "-P", "-m", "lacre_gateway.probe", "--settings", "/etc/lacre/gateway.toml"]
ENTRYPOINT ["/opt/lacre/bin/python", "-P", "-m", "lacre_gateway"]
CMD ["--settings", "/etc/lacre/gateway.toml"]

FROM ${BASE_IMAGE} AS worker
ARG VERSION=0 REVISION=unknown
LABEL org.opencontainers.image.title="Lacre worker" \
      org.opencontainers.image.description="Opens sealed requests and answers them with llama.cpp, on CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH="/opt/lacre/bin:$PATH" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY --from=worker-packages /opt/lacre /opt/lacre
COPY --from=llama /engine/opt/lacre /opt/lacre
COPY --from=worker-project --chown=65532:65532 /own/var/lib/lacre /var/lib/lacre
COPY --from=worker-project /own/opt/lacre /opt/lacre
USER 65532:65532
WORKDIR /var/lib/lacre
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["/opt/lacre/bin/python", "-P", "-m", "lacre_backend.health", "--settings", "/etc/lacre/worker.toml"]
ENTRYPOINT ["/opt/lacre/bin/python", "-P", "-m", "lacre_backend"]
CMD ["--settings", "/etc/lacre/worker.toml"]

FROM ${CUDA_IMAGE} AS worker-cuda
ARG VERSION=0 REVISION=unknown
LABEL org.opencontainers.image.title="Lacre worker (CUDA)" \
      org.opencontainers.image.description="Opens sealed requests and answers them with llama.cpp, on NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*
ENV PATH="/opt/lacre/bin:$PATH" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY --from=cuda /opt/lacre /opt/lacre
COPY --from=cuda /engine/opt/lacre /opt/lacre
COPY --from=cuda --chown=65532:65532 /own/var/lib/lacre /var/lib/lacre
COPY --from=cuda /own/opt/lacre /opt/lacre
USER 65532:65532
WORKDIR /var/lib/lacre
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["/opt/lacre/bin/python", "-P", "-m", "lacre_backend.health", "--settings", "/etc/lacre/worker.toml"]
ENTRYPOINT ["/opt/lacre/bin/python", "-P", "-m", "lacre_backend"]
CMD ["--settings", "/etc/lacre/worker.toml"]
