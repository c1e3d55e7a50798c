# Everything a person does with this repository: one line a target. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help setup demo test clients lint bench container fuzz gpu-test gpu-bench clean
help:       ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14
setup: $(READY)  ## .venv with everything, C kernels built
demo: setup      ## the embedded model tells a story, compiled
	@$(BIN)/ktrans chat --prompt "Tell me a story about a dog named Max." --temperature 0
test: setup      ## all tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile
clients: setup   ## clients from npm against `ktrans serve`, where npm is
	@KTRANS=$(abspath $(BIN)/ktrans) bash .ci/clients
lint: setup      ## ruff, and mypy --strict on ktcompile and passes
	@$(BIN)/ruff check . && $(BIN)/mypy --strict
bench: setup     ## the CPU kernels on this machine, JSON lines
	@$(BIN)/python benchmarks/bench_moe.py
container: setup ## the Dockerfile's steps without a container engine, then its server is asked (root)
	@$(BIN)/python .ci/container
fuzz: setup      ## fuzz GGUF headers and rules files, FUZZ_SECONDS=600 in all (needs atheris)
	@PYTHON=$(BIN)/python bash fuzz/run.sh
gpu-test:        ## build, test and check on a machine with a GPU and no network; JSON in out/
	@PYTHON=$(PYTHON) bash .ci/gpu test
gpu-bench:       ## the same machine's speed
	@PYTHON=$(PYTHON) bash .ci/gpu bench
clean:           ## remove what was built
	rm -rf build out $(VENV) ktcompile/_native*.so ktcompile/_native.c *.egg-info csrc/*.o tests/clients/node_modules

$(READY): pyproject.toml constraints.txt setup.py .ci/setup $(wildcard csrc/*.[ch]) csrc/build.py
	@PYTHON=$(PYTHON) VENV=$(VENV) bash .ci/setup && touch $@
