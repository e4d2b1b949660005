# make demo: install, segment photographs, train on generated scenes, score, write runs/demo/report.html
# make test: install the development tools, run the test suite
# make docs: build the documentation site into site/

PYTHON ?= python3
BIN = .venv/bin
# glibc hands big blocks back to the kernel after every step; keeping them makes training on a CPU a fifth faster.
export MALLOC_TRIM_THRESHOLD_ = 4294967296
export MALLOC_MMAP_THRESHOLD_ = 4294967296

.PHONY: demo test lint docs clean

demo: .venv/installed-demo
	$(BIN)/cmmasksd demo --config scenes-tiny --training.out runs/demo $(if $(wildcard runs/demo/last/state.pt),--resume)

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report term:skip-covered --cov-fail-under 90

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: .venv/installed-docs
	$(BIN)/python docs/make_api.py
	$(BIN)/zensical build --clean --strict

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/installed-demo: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

clean:
	rm -rf .venv runs site
