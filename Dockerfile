# `ktrans serve` in a container, from the wheel, as a user without rights. compose.yaml runs it.
#   docker build --target cpu -t ktrans:cpu .        docker build --target cuda -t ktrans:cuda .

FROM python:3.12-slim-bookworm AS wheel
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm AS base
RUN useradd --create-home --uid 10001 ktrans \
 && mkdir /home/ktrans/.cache /models \
 && chown ktrans:ktrans /home/ktrans/.cache
# Everything that can be made again is in the one folder that a volume keeps.
ENV HF_HUB_OFFLINE=1 \
    TRITON_CACHE_DIR=/home/ktrans/.cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/home/ktrans/.cache/torchinductor
COPY constraints.txt /constraints.txt
WORKDIR /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Others than this machine can come in, so it needs KTRANS_API_KEY.
ENTRYPOINT ["ktrans", "serve", "--host", "0.0.0.0"]

# Triton compiles a launcher for each kernel when it first runs: gcc. CUDA itself comes with torch, the driver from the host.
FROM base AS cuda
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch==2.13.0
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /constraints.txt "$(echo /wheels/*.whl)[gpu]"
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

FROM base AS cpu
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /constraints.txt /wheels/*.whl
USER 10001:10001
