# vLLM's official image plus this plugin. Build context: the repository.
#   docker build -t vl-cache-vllm .
#   docker run --gpus all -e VL_CACHE_VLLM_TRY_GPU=1 -p 8000:8000 vl-cache-vllm MODEL --kv-compress vlcache
# Experimental: eviction has not run on a GPU yet (docs/gpu-validation.md). Without the variable `--kv-compress`
# is refused at start-up; without the flag vLLM is as it was.
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
