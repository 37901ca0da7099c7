# vLLM's official image plus this plugin. Build context: the repository.
#   docker build -t vl-cache-vllm .
#   docker run --rm --gpus all -v vllm-cache:/root/.cache/vllm --entrypoint vl-cache-check vl-cache-vllm --if-needed
#   docker run --gpus all -v vllm-cache:/root/.cache/vllm -p 8000:8000 vl-cache-vllm MODEL --kv-compress vlcache-plus
# The first run checks eviction on this GPU and records the result in the volume (docs/gpu-validation.md). Without a
# record that passed, `--kv-compress` is refused at start-up; without the flag vLLM is as it was.
ARG VLLM_VERSION=v0.32.0
FROM vllm/vllm-openai:${VLLM_VERSION}

WORKDIR /opt/vl-cache-vllm
COPY pyproject.toml setup.py LICENSE README.md ./
COPY vl_cache_vllm vl_cache_vllm
COPY kernels kernels
COPY csrc csrc
# The image's own vLLM and torch stay untouched.
RUN python3 -m pip install --no-cache-dir --no-deps .

# The image's entry point is `vllm serve`; vLLM finds the plugin by its entry point.
WORKDIR /vllm-workspace
