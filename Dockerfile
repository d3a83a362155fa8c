# hldm with everything to train, measure and write. Runs are kept in /data/runs: mount a folder at /data.
#   docker build -t hldm .                             CPU
#   docker build -t hldm --build-arg TORCH=cu128 .     CUDA 12.8; the host needs NVIDIA's driver and container toolkit
#   docker run --rm -v "$PWD:/data" hldm generate --prompt "In the beginning"
#   docker run --rm -v "$PWD:/data" hldm demo --config /opt/hldm/configs/tiny.yaml
ARG BASE=debian:bookworm-slim
FROM ${BASE}

# g++ compiles the kernels on the machine that runs them, when they are first used
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv g++ make ca-certificates \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/hldm
COPY Makefile pyproject.toml constraints.txt README.md LICENSE ./

# torch first and by itself: it is large, and changes seldom
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/${TORCH}
RUN python3 -m venv .venv \
 && .venv/bin/pip install --no-cache-dir --index-url "${TORCH_INDEX}" "$(grep '^torch==' constraints.txt)"

COPY hldm hldm
COPY configs configs
COPY examples examples
RUN PIP_NO_CACHE_DIR=1 make .venv/installed

ENV PATH=/opt/hldm/.venv/bin:$PATH
RUN useradd --create-home --uid 1000 hldm && install -d -o hldm /data
USER hldm
WORKDIR /data
ENTRYPOINT ["hldm"]
CMD ["--help"]
