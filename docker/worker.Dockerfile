# inpaint-worker with its engines, for NVIDIA GPUs.
#   docker build -f docker/worker.Dockerfile -t inpaint-worker .
#
# torch's wheel brings cuDNN and its own CUDA libraries, so the base is NVIDIA's smallest: it
# adds the forward-compatible driver libraries and rejects a driver that is too old. Change
# CUDA and TORCH together, for example for a driver older than 580:
#   --build-arg CUDA=12.8.1 --build-arg TORCH=2.10.0 \
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
# INPAINT_COMPILE, off by default, needs a C compiler and Python's headers at run time, about
# 200 MB that nothing else uses:
#   --build-arg COMPILER="gcc libc6-dev python3.12-dev"
# INPAINT_QUANTIZATION, also off, needs torchao, which requires the TORCH below or a newer one:
#   --build-arg EXTRAS=worker,xformers,quantization
ARG CUDA=13.0.3

FROM nvidia/cuda:${CUDA}-base-ubuntu24.04 AS build
ARG TORCH=2.13.0
ARG TORCH_INDEX=https://pypi.org/simple
ARG EXTRAS=worker,xformers
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/inpaint
RUN /opt/inpaint/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch==$TORCH"
WORKDIR /source
COPY LICENSE README.md pyproject.toml ./
COPY producer producer
COPY workers workers
COPY shared shared
COPY migrations migrations
RUN /opt/inpaint/bin/pip install --no-cache-dir ".[$EXTRAS]" "torch==$TORCH"

FROM nvidia/cuda:${CUDA}-base-ubuntu24.04
ARG COMPILER=""
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12 libfribidi0 $COMPILER \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home inpaint \
    && install -d -o inpaint -g inpaint /data /var/cache/huggingface
COPY --from=build /opt/inpaint /opt/inpaint
ENV PATH=/opt/inpaint/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/cache/huggingface \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER inpaint
WORKDIR /data
# Weights are 5 GB: without a volume every new container would download them again.
VOLUME /var/cache/huggingface
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=60s --timeout=20s --start-period=300s --retries=3 \
    CMD ["inpaint-jobs", "doctor"]
CMD ["inpaint-worker"]
