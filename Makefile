# Everything a newcomer needs: `make demo`, `make test`. Python 3.10 to 3.12; PYTHON=python3.12 chooses one.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do command -v $$p 2>/dev/null && break; done)
VENV := .venv
BIN := $(VENV)/bin
# The demonstration needs the first, everything else the second.
APP_STAMP := $(VENV)/.installed-app
STAMP := $(VENV)/.installed
# The viewer of the page to annotate on; it is no Python package and no part of the project.
VIEWER := $(VENV)/.viewer
OUT ?= runs
# Groups of tests that run side by side: files, and files that share a server.
JOBS ?= 2
SIDE_BY_SIDE := -n $(JOBS) --dist loadgroup --no-loadscope-reorder
STUDY ?= eval/studies/demo.yaml

.PHONY: demo annotate viewer test test-slow system-test-dicom faults lint docs reference bench bench-nnunet fuzz quality phantoms study install clean

demo: $(APP_STAMP)
	$(BIN)/python -m eval.demo --out $(OUT)/demo --workers 2

# Phantoms, or the scans of DATA=folder; LABELS="a,b" names classes that its dataset.json does not.
annotate: $(APP_STAMP) $(VIEWER)
	$(BIN)/python -m eval.annotate --out $(OUT)/annotate $(if $(DATA),--data $(DATA)) $(if $(LABELS),--labels "$(LABELS)")

viewer: $(VIEWER)

$(VIEWER): apps/activelearning/lib/annotator/viewer_file.py | $(APP_STAMP)
	$(BIN)/python -m eval.upkeep.viewer
	@touch $@

test: $(STAMP) $(VIEWER)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not dicom"

# PART=0/4 for the first of four equally large parts.
test-slow: $(STAMP) $(VIEWER)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m slow $(if $(PART),--slow-part $(PART))

# OHIF on a PACS, in a headless browser; its pictures stay in runs/dicom.
system-test-dicom: $(STAMP)
	sh tests/dicom/install.sh
	$(BIN)/python -m pytest -m dicom -rs tests/dicom

# 500 faults on 2,000 images, an hour and a half; every fifth restart is a cold one. COUNT=20 for a first look.
faults: $(STAMP)
	mkdir -p $(OUT)
	$(BIN)/python -m tests.faults --count $(or $(COUNT),500) --seed 0 --images 2000 --out $(OUT)/faults.jsonl

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy apps/activelearning eval sample-datasets
	PYTHONPATH=apps/activelearning:. $(BIN)/lint-imports --no-logo
	$(BIN)/python -m eval.upkeep.layout
	$(BIN)/python -m eval.upkeep.licences
	$(BIN)/python -m eval.upkeep.vulnerabilities
	$(BIN)/python -m eval.upkeep.style

# The commands of the pages, really run on small phantoms; minutes.
docs: $(STAMP)
	$(BIN)/python -m eval.upkeep.pages --run

# The pages that are written from the code: methods, options, commands.
reference: $(STAMP)
	$(BIN)/python -m eval.app_tools.catalogue
	$(BIN)/python -m eval.app_tools.reference_pages

# 95 % of the lines and branches of the pure core and the ledger; pyproject.toml lists their modules.
coverage: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" --cov --cov-report=term tests/lib tests/eval/metrics

# Changes to the ledger, partial labels and selectors that tests notice: 85 %. GROUP=selectors for some; an hour for all.
mutation: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-mutation.txt
	$(BIN)/python -m eval.upkeep.mutation $(GROUP) --out $(OUT)/mutation

.PHONY: test-latest coverage mutation
# Everything as new as it can be, in an environment of its own; TORCH=newest where a GPU build is wanted. See its --help.
test-latest: $(STAMP)
	$(BIN)/python -m eval.upkeep.newest $(if $(TORCH),--torch $(TORCH))

bench: $(STAMP)
	$(BIN)/python -m eval bench query
	$(BIN)/python -m eval bench surfaces
	$(BIN)/python -m eval bench training
	$(BIN)/python -m eval bench equal
	$(BIN)/python -m eval bench scoring
	$(BIN)/python -m eval bench rounds
	$(BIN)/python -m eval bench latency

# Broken and hostile input at random, at the readers and at a server of its own; CASES=4000 for a first look.
CASES ?= 50000
SEED ?= 0

fuzz: $(STAMP)
	@mkdir -p $(OUT)
	$(BIN)/python -m eval bench fuzz --cases $(CASES) --seed $(SEED) --json $(OUT)/fuzz.json

# What the recipes reach: hippocampi (quick, 100 patches, default) and phantoms; hours on a small machine.
quality: $(STAMP) phantoms
	for study in quality_quick quality_100 quality_default quality_phantoms; do \
		$(BIN)/python -m eval run eval/studies/$$study.yaml --out $(OUT)/$$study || exit; done

phantoms: $(OUT)/phantoms/amos $(OUT)/phantoms/acdc $(OUT)/phantoms/kits

$(OUT)/phantoms/%: | $(STAMP)
	$(BIN)/python sample-datasets/phantoms.py $@ --preset $* --cases 40 --seed 5

# nnU-Net's own trainer, in an environment of its own; about three quarters of an hour, MINUTES=2 for a first look.
bench-nnunet: $(STAMP) .venv-nnunet/.installed
	NNUNET_PYTHON=.venv-nnunet/bin/python $(BIN)/python -m eval bench nnunet

.venv-nnunet/.installed:
	$(PYTHON) -m venv .venv-nnunet
	.venv-nnunet/bin/python -m pip install --disable-pip-version-check nnunetv2==2.8.1 torch==2.13.0
	@touch $@

study: $(STAMP)
	$(BIN)/python -m eval run $(STUDY) --out $(OUT)/$(basename $(notdir $(STUDY)))

install: $(STAMP)

# A machine without CUDA is served best by a CPU build of torch; where pip knows none, the requirement takes what it finds.
$(APP_STAMP): requirements.txt
	@test -n "$(PYTHON)" || { echo "No Python found: install Python 3.10, 3.11 or 3.12, or name one with PYTHON=..."; exit 2; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else "Python %d.%d found at " % v + sys.executable + ": 3.10 to 3.12 is supported; name one with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

$(STAMP): $(APP_STAMP) requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) .venv-nnunet .venv-latest $(OUT)
