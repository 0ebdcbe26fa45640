# Three images: `service` (the default) serves; `train` builds features and models and publishes
# them; `load` has Locust. Models and the feature repository come by volume, Redis by its address.
# Any Debian-like base with Python 3.11 or 3.12 and its venv module does.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
WORKDIR /build
COPY requirements/bootstrap.txt requirements/
RUN python3 -m venv /build/tools \
    && /build/tools/bin/pip install --no-cache-dir --require-hashes -r requirements/bootstrap.txt
COPY pyproject.toml README.md LICENSE ./
COPY app app
RUN /build/tools/bin/pip wheel --no-deps --no-build-isolation --no-index --wheel-dir dist .

# An environment holds its lock and the project, nothing else: not even pip. All are made in one
# folder, /opt/hikyaku, because an environment cannot be moved.
FROM build AS service-environment
COPY requirements/service.txt requirements/
RUN python3 -m venv --without-pip /opt/hikyaku \
    && /build/tools/bin/pip --python /opt/hikyaku install --no-cache-dir --require-hashes \
        -r requirements/service.txt \
    && /build/tools/bin/pip --python /opt/hikyaku install --no-deps --no-index dist/*.whl

FROM build AS train-environment
COPY requirements/train.txt requirements/
RUN python3 -m venv --without-pip /opt/hikyaku \
    && /build/tools/bin/pip --python /opt/hikyaku install --no-cache-dir --require-hashes \
        -r requirements/train.txt \
    && /build/tools/bin/pip --python /opt/hikyaku install --no-deps --no-index dist/*.whl

FROM build AS load-environment
COPY requirements/dev.txt requirements/
RUN python3 -m venv --without-pip /opt/hikyaku \
    && /build/tools/bin/pip --python /opt/hikyaku install --no-cache-dir --require-hashes \
        -r requirements/dev.txt

FROM ${BASE_IMAGE} AS base
# ONNX Runtime would otherwise report its use to its makers, with an id of the machine.
ENV PATH=/opt/hikyaku/bin:$PATH PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
RUN useradd --system --uid 10001 --no-create-home --home-dir /tmp hikyaku

# Run in a checkout: ./feature_repo and ./models belong below /workspace.
FROM base AS train
COPY --from=train-environment /opt/hikyaku /opt/hikyaku
WORKDIR /workspace
USER 10001

FROM base AS load
COPY --from=load-environment /opt/hikyaku /opt/hikyaku
WORKDIR /workspace
USER 10001
EXPOSE 8089
CMD ["locust", "--locustfile", "loadtests/locustfile.py"]

FROM base AS service
COPY --from=service-environment /opt/hikyaku /opt/hikyaku
# Copies of models are large, and /tmp is often memory: they get a volume of their own.
RUN install --directory --mode 700 --owner 10001 /var/lib/hikyaku
# Others reach it there: it does not start without HIKYAKU_OPERATOR_TOKEN or …_FILE.
ENV HIKYAKU_HOST=0.0.0.0 MODEL_REPOSITORY=/models HIKYAKU_FEATURE_REPO=/feature_repo \
    HIKYAKU_WORK_DIR=/var/lib/hikyaku
VOLUME ["/models", "/feature_repo", "/var/lib/hikyaku"]
WORKDIR /tmp
# By number, so that Kubernetes can see that it is not root.
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["python3", "-c", \
    "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ.get(\"HIKYAKU_PORT\") or 8000}/v2/health/live', timeout=2)"]
CMD ["hikyaku", "serve"]
