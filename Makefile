# make help: what there is

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
EXTRAS := offline-weights,codecs,track,volumes,export,dicom-out,demo,docs
# an index with PyTorch's CPU builds, if 2.5 GB of GPU packages are to be left out
TORCH_INDEX ?=
export PYTHONWARNINGS := ignore:`torch.jit.script` is deprecated
ifdef LUNGDET_DATA
# notebooks run in nbs/; `override`, since it may come from the command line
override LUNGDET_DATA := $(abspath $(LUNGDET_DATA))
export LUNGDET_DATA
endif

.PHONY: help env course test notebooks pytest check bench lab outputs readme docs wheel clean

help: ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

env: $(READY) ## Make .venv with everything the course needs (again only when constraints.txt or pyproject.toml changes)

$(READY): constraints.txt pyproject.toml
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --index-url $(TORCH_INDEX) torch torchvision)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,$(EXTRAS)]'
	touch $@

course: $(READY) ## Run the whole course and write _course/report.html (LUNGDET_DATA=folder for the real challenge)
	$(BIN)/python tools/course.py

test: check notebooks pytest ## Export check, every notebook, every test

notebooks: $(READY) ## Run every notebook as a test
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print

pytest: $(READY) ## Run the tests in tests/
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

check: $(READY) ## Are modules and README what the notebooks say?
	$(BIN)/python tools/check.py

bench: $(READY) ## Race all that has a rival, about 10 minutes on 2 cores; one table, kept in bench/results/speed.csv
	$(BIN)/python -W ignore bench/all.py

lab: $(READY) ## Open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

outputs: $(READY) ## Run the notebooks in place, in order, to renew the outputs that they keep
	$(BIN)/python tools/course.py --in-place && $(BIN)/nbdev_clean

readme: $(READY) ## Write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

docs: $(READY) ## Build the site in _docs/
	$(BIN)/python tools/docs.py --strict

wheel: ## Build the package, install it into an empty environment with the newest versions of all it needs, and run tests/ there
	rm -rf _dist && $(PYTHON) -m venv _dist/venv
	_dist/venv/bin/pip install -q --disable-pip-version-check build
	_dist/venv/bin/python -m build --wheel -o _dist . >_dist/build.log
	_dist/venv/bin/pip install -q --disable-pip-version-check "$$(echo _dist/*.whl)[$(EXTRAS)]" pytest pytest-xdist hypothesis pycocotools torchxrayvision playwright 'dask[distributed]'
	LUNGDET_UNPINNED=1 OMP_NUM_THREADS=1 PATH="$(CURDIR)/_dist/venv/bin:$$PATH" _dist/venv/bin/pytest -n 2 --dist loadfile --max-worker-restart 0

clean: ## Delete what was made (not .venv)
	rm -rf _course _docs _dist build data/work
