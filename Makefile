# make demo    the four models on generated cells, at quick size: no download, about ten minutes
# make suite   the full job on BloodMNIST: SEEDS= MODELS= PRESET= EXTRACTOR= DATA_ROOT= OUT= narrow it
#              DATASET= takes other images, SIZE= their side in pixels:
#                make suite MODELS=cwgan_gp DATASET=pbc SIZE=64 OUT=my_pbc64
#                make suite MODELS=cgan DATASET=mnist OUT=my_digits
# Every target makes .venv and installs requirements.txt by itself, once.

PYTHON ?= python3
MODELS ?= cvae dcgan ddpm cwgan_gp
PRESET ?= baseline
DATASET ?= bloodmnist
SIZE ?=
EXTRACTOR ?= inception
DATA_ROOT ?= data

VENV := .venv
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python

.PHONY: help install demo suite ablations augmentation fid checkpoints samples paper benchmark test clean

help:
	@echo "make install    .venv with the packages of requirements.txt; the others do it, too"
	@echo "make demo       four models, two seeds (SEEDS=), generated cells -> results/demo"
	@echo "make suite      four models, five seeds (SEEDS=), BloodMNIST -> my_results (OUT=)"
	@echo "                narrow it with MODELS=\"cvae dcgan\" PRESET= EXTRACTOR= DATA_ROOT= JOBS= OUT="
	@echo "                DATASET=pbc, mnist, ... takes other images, SIZE= their side in pixels:"
	@echo "                make suite MODELS=cwgan_gp DATASET=pbc SIZE=64 OUT=my_pbc64"
	@echo "                make suite MODELS=cgan DATASET=mnist OUT=my_digits"
	@echo "make ablations  changed settings against each preset, three seeds (SEEDS=)"
	@echo "                -> my_results/ablations; GRID=published or best, MODELS= narrows it"
	@echo "make augmentation  do synthetic cells help a classifier? STUDY=bccd, imbalance,"
	@echo "                generators (of the runs in OUT=) -> results/augmentation"
	@echo "make fid        measure the kept weights of all runs anew with Inception-v3 -> results/fid"
	@echo "make checkpoints  ship the weights of the best runs in results -> results/checkpoints"
	@echo "make samples    draw grids with the shipped weights, without data -> samples (OUT=)"
	@echo "make paper      the paper, from the records in results -> paper/paper.pdf"
	@echo "make benchmark  speed of training, sampling and evaluation -> results/benchmarks"
	@echo "make test       all tests"
	@echo "make clean      remove results/demo and caches, not .venv and not other results"

install: $(INSTALLED)

demo: SEEDS ?= 2
demo: JOBS ?= 2
demo: $(INSTALLED)
	$(RUN) run_suite.py --models $(MODELS) --preset quick --seeds $(SEEDS) --dataset demo \
		--extractor demo --out results/demo --jobs $(JOBS)

suite: SEEDS ?= 5
suite: JOBS ?= 1
suite: OUT ?= my_results
suite: $(INSTALLED)
	$(RUN) run_suite.py --models $(MODELS) --preset $(PRESET) --seeds $(SEEDS) \
		--dataset $(DATASET) $(if $(SIZE),--set image_size=$(SIZE)) \
		--data-root "$(DATA_ROOT)" --extractor "$(EXTRACTOR)" --out "$(OUT)" --jobs $(JOBS)

# Of all models that the grid has rows for, unless the command line says MODELS=.
ablations: GRID ?= published
ablations: MODELS :=
ablations: SEEDS ?= 3
ablations: JOBS ?= 1
ablations: OUT ?= my_results
ablations: $(INSTALLED)
	$(RUN) run_suite.py --ablations $(GRID) $(if $(MODELS),--models $(MODELS)) --seeds $(SEEDS) \
		--dataset bloodmnist --data-root "$(DATA_ROOT)" --extractor "$(EXTRACTOR)" \
		--out "$(OUT)" --jobs $(JOBS)

augmentation: STUDY ?= bccd
augmentation: OUT ?= results
augmentation: $(INSTALLED)
	$(RUN) run_suite.py --study $(STUDY) $(if $(SEEDS),--seeds $(SEEDS)) \
		--data-root "$(DATA_ROOT)" --out "$(OUT)" $(if $(JOBS),--jobs $(JOBS))

fid: $(INSTALLED)
	$(RUN) run_suite.py --remeasure results --data-root "$(DATA_ROOT)" \
		--extractor inception --out results/fid

checkpoints: $(INSTALLED)
	$(RUN) checkpoints.py ship
	$(RUN) -m evaluation.gallery results

samples: OUT ?= samples
samples: $(INSTALLED)
	$(RUN) checkpoints.py draw --out "$(OUT)"

paper: $(INSTALLED)
	$(RUN) -m paper.build

benchmark: $(INSTALLED)
	PYTHONPATH=. $(RUN) tests/benchmark.py
	PYTHONPATH=. $(RUN) tests/benchmark.py --large

# One process for each core, four at most: each loads torch.
test: $(INSTALLED)
	$(RUN) -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

clean:
	rm -rf results/demo .pytest_cache .ruff_cache .hypothesis
# Not the classifiers: those trained anew are others, and no table may mix their words.
	find .cache -mindepth 1 -maxdepth 1 ! -name classifiers -exec rm -rf {} + 2>/dev/null || true
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# The stamp is newer than requirements.txt once everything is installed: then pip is not called,
# so that all targets work offline.
$(INSTALLED): requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "error: Python 3.11 or later is needed; name it with make PYTHON=..." >&2; exit 2; }
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing the packages of requirements.txt into $(VENV); this takes some minutes"
	@$(RUN) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@
