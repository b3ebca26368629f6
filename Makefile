# make demo, make test: everything from an empty checkout. A second run repeats only what changed inputs ask for.
#
# PYTHON=python       interpreter of an environment that exists; only what it lacks is installed (default: .venv, made here;
#                     for make gpu and gpu-sanitize, which install nothing, python3)
# BASE_PYTHON=python  what .venv is made with (default: the first of python3, python3.14, ... that is 3.10 or newer)
# TORCH=requirement   what pip installs as torch, options included; with PYTHON= only if there is no torch at all
# OUT=folder          where the demo writes its curves and numbers
# ARGS=arguments      more arguments for pytest, the demo, the inspection, make wheels,
#                     gpu or gpu-sanitize; a part of the names of mutants
# TASKS=names         tasks that make results and make tune are about (default: all)
# FISHER_KERNELS_NATIVE=auto|on|off, FISHER_KERNELS_CPU=native|all|avx2|..., FISHER_KERNELS_CUDA=auto|on|off,
# FISHER_KERNELS_CUDA_ARCHS=80,90,100, FISHER_KERNELS_WERROR=ON|OFF, CXX=compiler
#                     settings of the native build, from the environment as well; by default it is for this machine

TORCH = torch==2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
export PIP_NO_COMPILE ?= 1# Python compiles what is imported, which is little of it
OUT = build/demo
TASKS =

# The demo: optimizers against the clock, in seconds of training for each run, on the autoencoder.
DEMO = adamw,mbf,kfac
DEMO_BUDGET = 4

ifdef PYTHON
  PY := $(PYTHON)
  INSTALL_TORCH = $(PY) -I -c 'from importlib.metadata import version; version("torch")' 2>/dev/null || \
    $(PY) -m pip install $(TORCH)
else
  VENV := .venv/bin/python
  PY := $(VENV)
  INSTALL_TORCH = $(PY) -m pip install $(TORCH)
endif

# Stamps say what was done in an environment. They hold while the environment has an editable install of this
# checkout and the settings are the same.
STAMPS := build/make/$(subst /,-,$(PY))
INSTALLED := $(shell $(PY) -I -c 'import importlib.metadata as m, pathlib; \
  print(*(pathlib.Path.cwd().as_uri() in (d.read_text("direct_url.json") or "") \
  for d in m.distributions(name="fisher_kernels")))' 2>/dev/null)
SETTINGS.torch := $(TORCH)
SETTINGS.native := native=$(FISHER_KERNELS_NATIVE) cpu=$(FISHER_KERNELS_CPU) werror=$(FISHER_KERNELS_WERROR) \
  cuda=$(FISHER_KERNELS_CUDA) archs=$(FISHER_KERNELS_CUDA_ARCHS) \
  compiler=$(if $(filter-out default,$(origin CXX)),$(CXX))
NATIVE_SOURCES := CMakeLists.txt setup.py $(shell find cmake csrc)
ifdef FISHER_KERNELS_PORTABLE
  $(error FISHER_KERNELS_PORTABLE is '$(FISHER_KERNELS_PORTABLE)'; FISHER_KERNELS_CPU=baseline says the same now)
endif

# What a build for other machines has, unless the settings say otherwise.
ARCHS := 80,90,100
EVERYTHING = FISHER_KERNELS_CPU=$(or $(FISHER_KERNELS_CPU),all) FISHER_KERNELS_CUDA=$(or $(FISHER_KERNELS_CUDA),on) \
  FISHER_KERNELS_CUDA_ARCHS=$(or $(FISHER_KERNELS_CUDA_ARCHS),$(ARCHS))

.DELETE_ON_ERROR:
ifndef AT_ONCE
.NOTPARALLEL:
endif
.PHONY: help demo readme test test-all fuzz mutants bench gpu gpu-sanitize tune results data models inspect docs lint build dist wheels clean FORCE

help:
	@echo 'make demo    trains an autoencoder with AdamW, MBF and KFAC, against the clock (under a minute)'
	@echo 'make readme  runs the demo again for the picture and the table of README.md'
	@echo 'make test    runs the tests'
	@echo 'make test-all  runs every case of every test, some under sanitizers'
	@echo 'make fuzz    draws 10,000 calls of each op at random, next to definitions of their own'
	@echo 'make mutants puts deliberate faults in a copy, and shows that the tests catch each of them'
	@echo 'make bench   measures the kernels against their baselines'
	@echo 'make gpu     proves and measures the kernels on a CUDA GPU, in ten minutes; installs nothing'
	@echo 'make gpu-sanitize  runs the self-test of the CUDA kernels under compute-sanitizer, on a CUDA GPU'
	@echo 'make tune    searches for the learning rate of every optimizer on every task (two hours)'
	@echo 'make results compares the optimizers on every task, into docs/results.md (two to three hours)'
	@echo 'make data    brings the images of Fashion-MNIST to build/data, from the Debian package'
	@echo 'make models  counts what of published models has a rule, into docs/models.md'
	@echo 'make inspect compiles every GPU kernel for GPUs that need not be here, and reads its code (ten minutes)'
	@echo 'make docs    builds the documentation as a site, in build/site, and checks its links'
	@echo 'make lint    ruff and mypy'
	@echo 'make build   environment, native module, editable install'
	@echo 'make dist    sdist and wheel for this Python, in dist/, installed and self-tested'
	@echo 'make wheels  wheels for other machines and every Python at hand, in dist/, installed and self-tested'
	@echo 'make clean   removes what was built, but not .venv'
	@echo
	@sed -n '/^# [A-Z_]*=/,/^$$/s/^# //p' Makefile

demo: environment.demo
	$(PY) -m fisher_kernels compare autoencoder --optimizers $(DEMO) --budget $(DEMO_BUDGET) --force --out $(OUT) $(ARGS)

# On a machine with nothing beside it: what else runs there shares its caches, and every run gets fewer steps.
readme: build
	$(MAKE) demo OUT=docs/results/demo
	$(PY) -m bench.tables

# A process for each core, each on one thread; tests of threads set their number.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --dist worksteal

test: environment.test
	$(PYTEST) $(ARGS)

test-all: build $(STAMPS)/cuda-on-host.all
	$(PYTEST) --all $(ARGS)

# Fewer on what is slow here; a failure is printed as a small call. ARGS="--fuzz 500" draws others than 10,000.
fuzz: build $(STAMPS)/cuda-on-host.ON
	$(PYTEST) tests/fuzz --fuzz 10000 --timeout=0 $(ARGS)

# Goes on where it was interrupted; ARGS=name runs the faults with that in their names.
mutants: build
	$(PY) -m tests.mutants $(ARGS)

bench: build
	OMP_PROC_BIND=true $(PY) -m pytest bench $(ARGS)

# In an environment that has everything already, without a network: PYTHON= names it.
gpu:
	$(or $(PYTHON),python3) -m bench.gpu $(ARGS)

gpu-sanitize:
	$(or $(PYTHON),python3) -m bench.gpu.sanitize $(ARGS)

# Both go on where they were interrupted: bench/results/study/ has what is known.
tune: build
	$(PY) -m bench.study tune $(TASKS)

results: build
	$(PY) -m bench.study run $(TASKS)
	$(PY) -m bench.study report $(TASKS)

# Fashion-MNIST, for the tasks on it, out of Debian's package of it; needs apt-get and dpkg, and no root.
data: build/data/usr/share/datasets/fashion-mnist
build/data/usr/share/datasets/fashion-mnist:
	@command -v apt-get dpkg >/dev/null || { echo 'make data needs apt-get and dpkg; docs/environment.md says where else the data may lie' >&2; exit 1; }
	rm -rf build/debian && mkdir -p build/debian
	cd build/debian && apt-get --quiet=2 download dataset-fashion-mnist
	dpkg -x build/debian/dataset-fashion-mnist_*.deb build/debian/content
	mkdir -p $(@D) && mv build/debian/content/usr/share/datasets/fashion-mnist $(@D)/
	rm -r build/debian

models: build
	$(PY) -m tests.zoo --page docs/models.md $(ARGS)

inspect:
	$(MAKE) build $(EVERYTHING) FISHER_KERNELS_WERROR=ON
	$(PY) -m fisher_kernels inspect $(ARGS)
	$(MAKE) $(STAMPS)/cuda-on-host.all $(EVERYTHING) FISHER_KERNELS_WERROR=ON
	$(PY) -m fisher_kernels inspect --traffic

# A broken link, a public name that is not documented and any other warning fail it.
docs: build
	rm -rf build/site
	$(PY) -m sphinx --quiet --fail-on-warning --keep-going -d build/site-cache docs build/site
	PYTHONPATH=docs $(PY) -m _site.links build/site

lint: build
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

build: environment.dev

# The wheel is built from the sdist.
dist: build
	rm -rf dist
	$(EVERYTHING) $(PY) -m build --no-isolation
	$(PY) -m twine check --strict dist/*
	$(PY) cmake/wheels.py --torch '$(TORCH)' check dist/*.whl

wheels: build
	rm -rf dist
	$(EVERYTHING) $(PY) cmake/wheels.py --torch '$(TORCH)' build $(ARGS)

clean:
	rm -rf build dist fisher_kernels.egg-info fisher_kernels/_native.*.so fisher_kernels/_cuda_on_host*.so fisher_kernels/_native_missing.txt
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -prune -exec rm -r {} +

FORCE:

.venv/bin/python:
	@for python in $(or $(BASE_PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python3.10); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	    echo "$$python -m venv .venv"; $$python -m venv .venv || { rm -rf .venv; exit 1; }; exit; \
	  fi; \
	done; \
	echo 'Python 3.10 or newer was not found; name one with BASE_PYTHON=' >&2; exit 1

$(STAMPS)/settings.%: FORCE
	@mkdir -p $(@D)
	@$(if $(filter True,$(INSTALLED)),echo '$(SETTINGS.$*)' | cmp -s - $@ ||) echo '$(SETTINGS.$*)' > $@

# The native module needs nothing of torch: it is compiled while pip installs that.
environment.%: FORCE
	@$(MAKE) --no-print-directory --jobs=2 AT_ONCE=yes $(STAMPS)/installed $(STAMPS)/requirements.$* $(AND.$*)
AND.test = $(STAMPS)/cuda-on-host.ON

# $(call requirements,EXTRA) installs what pyproject.toml asks for. The constraint keeps torch from being replaced.
requirements = $(PY) cmake/requirements.py $1 > $@.txt && $(PY) -m pip install $2 --requirement $@.txt

$(STAMPS)/build-tools: pyproject.toml cmake/requirements.py $(STAMPS)/settings.torch | $(VENV)
	$(call requirements,build)
	@touch $@

# Before what depends on it: asked for by a package, it would be the newest, with gigabytes of CUDA libraries.
$(STAMPS)/torch: $(STAMPS)/settings.torch | $(STAMPS)/build-tools
	$(INSTALL_TORCH)
	@$(PY) -I -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@

# Tests need all that the demo does, and development all that tests do.
IMPLIED.dev := test demo
IMPLIED.test := demo
$(STAMPS)/requirements.%: pyproject.toml cmake/requirements.py $(STAMPS)/torch
	$(call requirements,$*,--constraint $(STAMPS)/torch)
	@touch $@ $(IMPLIED.$*:%=$(STAMPS)/requirements.%)

# The stamp has the time the build began, so that no edit made meanwhile is missed. Without a module there is none:
# what was missing may be there next time, and until then every run says what it is.
$(STAMPS)/native: $(NATIVE_SOURCES) $(STAMPS)/settings.native $(STAMPS)/build-tools
	@touch $@.began
	$(PY) setup.py --quiet build_ext --inplace
	@$(PY) -I -c 'import pathlib, sys, sysconfig; \
	  sys.exit(not pathlib.Path("fisher_kernels/_native" + sysconfig.get_config_var("EXT_SUFFIX")).exists())' && mv $@.began $@ || :

# The CUDA kernels as they run on the CPU, where there are a toolkit's headers: for the tests, and nothing else. The
# other modules, with sanitizers and traced, are older than any new one of the first.
$(STAMPS)/cuda-on-host.ON: $(STAMPS)/native
$(STAMPS)/cuda-on-host.all: $(STAMPS)/cuda-on-host.ON
$(STAMPS)/cuda-on-host.%:
	if [ -e $(STAMPS)/native ]; then FISHER_KERNELS_CUDA_ON_HOST=$* $(PY) setup.py --quiet build_ext --inplace; fi
	@if ls fisher_kernels/_cuda_on_host.* >/dev/null 2>&1; then touch $@; fi

# After all else that this call is for: it runs pip and asks CMake again whether anything is left to build.
$(STAMPS)/installed: pyproject.toml setup.py $(STAMPS)/settings.native $(STAMPS)/build-tools $(STAMPS)/torch | \
  $(STAMPS)/native $(filter-out $(STAMPS)/installed,$(filter $(STAMPS)/%,$(MAKECMDGOALS)))
	$(PY) -m pip install --no-build-isolation --no-deps --editable .
	@touch $@
