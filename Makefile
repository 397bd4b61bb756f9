# make help: what there is

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# an index with PyTorch's CPU builds, if 2.5 GB of GPU packages are to be left out
TORCH_INDEX ?=
export PYTHONWARNINGS := ignore:`torch.jit.script` is deprecated
ifdef LUNGDET_DATA
# notebooks run in nbs/; `override`, since it may come from the command line
override LUNGDET_DATA := $(abspath $(LUNGDET_DATA))
export LUNGDET_DATA
endif

.PHONY: help env course test notebooks pytest check lab outputs readme docs clean

help: ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

env: $(READY) ## Make .venv with everything the course needs (again only when constraints.txt or pyproject.toml changes)

$(READY): constraints.txt pyproject.toml
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --index-url $(TORCH_INDEX) torch torchvision)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,offline-weights,codecs,track,volumes,export,dicom-out,demo,docs]'
	touch $@

course: $(READY) ## Run the whole course and write _course/report.html (LUNGDET_DATA=folder for the real challenge)
	$(BIN)/python tools/course.py

test: check notebooks pytest ## Export check, every notebook, every test

notebooks: $(READY) ## Run every notebook as a test
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print

pytest: $(READY) ## Run the tests in tests/
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY) ## Are modules and README what the notebooks say?
	$(BIN)/python tools/check.py

lab: $(READY) ## Open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

outputs: $(READY) ## Run the notebooks in place, in order, to renew the outputs that they keep
	$(BIN)/python tools/course.py --in-place && $(BIN)/nbdev_clean

readme: $(READY) ## Write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

docs: $(READY) ## Build the site in _docs/
	$(BIN)/python tools/docs.py --strict

clean: ## Delete what was made (not .venv)
	rm -rf _course _docs data/work
