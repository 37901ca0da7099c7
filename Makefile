# Two commands on a clean machine with Python 3.11 and pip: `make test` and `make demo`.
# Both build .venv first (vLLM's CPU build, this package, the tools) and reuse it while it is current.

PYTHON ?= python3
# An index with PyTorch's CPU wheels. By default: pip's configuration, then PyTorch's public one.
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
# The stamp names what the environment was built from; a change of any of these rebuilds it.
STAMP := $(VENV)/stamp-$(shell cat pyproject.toml setup.py Makefile tools/set_up.py csrc/*.cpp csrc/*.h $$(find tools/vllm-cpu-shim -type f -not -path '*/__pycache__/*' | sort) | sha256sum | cut -c1-16)
# Intel's OpenMP, which comes with vLLM's CPU build, is markedly faster than the default one.
RUN := LD_PRELOAD="$(CURDIR)/$(VENV)/lib/libiomp5.so$${LD_PRELOAD:+:$$LD_PRELOAD}" HF_HUB_OFFLINE=1

# Training allocates the same large tensors in every step; with these the C library keeps them.
KEEP := MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

.PHONY: env test test-quick lint demo bench bench-smoke soak accuracy accuracy-pretrained accuracy-pretrained-tune accuracy-agent accuracy-hybrid train train-drafts train-hybrid train-words clean

env: $(STAMP)

$(STAMP):
	$(PYTHON) tools/set_up.py $(VENV) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
	rm -f $(VENV)/stamp-*
	touch $@

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_markdown.py

# Tests in parallel processes of one thread each: a tiny model gains nothing from a second thread.
# Servers have the machine to themselves.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest tests
PARALLEL := OMP_NUM_THREADS=1 $(RUN) $(PYTEST) --numprocesses $(WORKERS)

# The second run drives the tests marked both_runners through vLLM's V2 model runner, and the Triton
# kernels, through Triton's interpreter.
test: lint
	$(PARALLEL) -m "not server"
	VLLM_USE_V2_MODEL_RUNNER=1 $(PARALLEL) -m "both_runners or interpreter"
	$(RUN) $(PYTEST) -m server

# For the edit loop: no engines and no servers.
test-quick: env
	$(PARALLEL) -m "not slow and not server"

demo: env
	$(RUN) $(BIN)/python -m evaluation.demo

bench-smoke: env
	$(RUN) $(BIN)/python -m benchmarks.smoke --json

# One to two hours on two cores; nothing else should run meanwhile.
bench: env
	$(RUN) $(BIN)/python -m benchmarks.serving --profile cpu --json benchmarks/results/serving.json
	$(RUN) $(BIN)/python -m benchmarks.serving --profile cpu-early --num-prompts 32 --json benchmarks/results/serving-early.json
	$(RUN) $(BIN)/python -m benchmarks.serving --profile cpu-ample --num-prompts 16 --json benchmarks/results/serving-ample.json
	$(RUN) $(BIN)/python -m benchmarks.offline --repeats 3 --json benchmarks/results/offline.json
	$(RUN) $(BIN)/python -m benchmarks.turns --json benchmarks/results/turns.json
	$(RUN) $(BIN)/python -m benchmarks.overhead --json benchmarks/results/overhead.json
	$(BIN)/python -m benchmarks.report

soak: env
	$(RUN) $(BIN)/python -m checks.soak --json benchmarks/results/soak.json

accuracy: env
	$(RUN) $(BIN)/python -m evaluation.accuracy --ablation --json benchmarks/results/accuracy.json

# The model is built from the weights of a package. Fewer questions where none share a prefill (with
# h2o, which observes whole prompts, and where the question comes first) and for the other policies.
PRETRAINED := $(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m evaluation.accuracy --bench pretrained
TENTH := vlcache@0.1 snapkv@0.1 pyramidkv@0.1 streamingllm@0.1 random@0.1
PARTS := build/accuracy-pretrained

$(PARTS)-h2o.json: env
	mkdir -p build
	$(PRETRAINED) --forms completion chat --samples 20 --policies h2o@0.1 --budgets 1.0 --json $@

$(PARTS)-others.json: env
	mkdir -p build
	$(PRETRAINED) --forms completion chat --samples 60 --policies $(TENTH) --budgets 1.0 --json $@

$(PARTS)-plus-%.json: env
	mkdir -p build
	$(PRETRAINED) --forms $* --policies vlcache-plus vlcache-plus:evict_after=0@0.1 --json $@

# Its parts are independent: make -j 2 accuracy-pretrained
accuracy-pretrained: $(addprefix $(PARTS)-,h2o.json others.json plus-completion.json plus-chat.json)
	$(PRETRAINED) --report $^ --json benchmarks/results/accuracy-pretrained.json

$(PARTS)-tune-%.json: env
	mkdir -p build
	$(PRETRAINED) --split tune --forms $* --policies vlcache-plus@0.1 vlcache-plus:evict_after=0@0.1 --budgets 1.0 --json $@

# The same of the tuning split, at one budget.
accuracy-pretrained-tune: $(addprefix $(PARTS)-tune-,completion.json chat.json)
	$(PRETRAINED) --report $^ --json benchmarks/results/accuracy-pretrained-tune.json

accuracy-hybrid: env
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m evaluation.accuracy --bench hybrid-reader --samples 200 --policies vlcache-plus vlcache-plus:evict_after=0 vlcache snapkv --budgets 0.05 0.1 0.2 0.4 1.0 --json benchmarks/results/accuracy-hybrid.json

accuracy-agent: env
	$(PRETRAINED) --forms chat-first --samples 20 --policies vlcache-plus@0.1 --budgets 1.0 --json benchmarks/results/accuracy-pretrained-first.json
	$(RUN) $(BIN)/python -m evaluation.accuracy --bench agent --samples 20 --policies vlcache-plus@0.1 --budgets 1.0 --json benchmarks/results/accuracy-agent.json

train: env
	$(KEEP) $(RUN) $(BIN)/python -m training.train --out build/page-reader
	$(RUN) $(BIN)/python -m training.export build/page-reader models/page-reader

train-hybrid: env
	$(KEEP) $(RUN) $(BIN)/python -m training.hybrid.train --out build/hybrid-reader
	$(RUN) $(BIN)/python -m training.hybrid.export build/hybrid-reader models/hybrid-reader

train-drafts: env
	$(KEEP) $(RUN) $(BIN)/python -m training.drafts.train --out build/page-reader-eagle3
	$(RUN) $(BIN)/python -m training.drafts.export build/page-reader-eagle3 models/page-reader-eagle3

train-words: env
	$(BIN)/python -m evaluation.pretrained.build_model build/pretrained
	$(BIN)/python -m evaluation.pretrained.vocabulary build/pretrained build/vocabulary.json
	$(KEEP) $(RUN) $(BIN)/python -m training.words.train --language-model build/pretrained --counts build/vocabulary.json --out build/word-reader
	$(KEEP) $(RUN) $(BIN)/python -m training.words.refine --language-model build/pretrained --counts build/vocabulary.json --out build/word-reader
	$(RUN) $(BIN)/python -m training.words.export build/word-reader models/word-reader

clean:
	rm -rf $(VENV) build *.egg-info
