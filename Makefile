# `make help` lists the targets. Every target first brings .venv up to date, which is immediate if nothing changed.

PYTHON ?= python3
BIN := .venv/bin

# All DDS traffic stays on this machine. Each checkout uses its own four ROS domains between 1 and 100, one for the demo
# and the next three for the test processes (tests/conftest.py), so that they and other checkouts do not interfere.
PLACE := $(shell printf '%s' '$(CURDIR)' | cksum | cut -d ' ' -f 1)
DEMO_DOMAIN ?= $(shell echo $$(( $(PLACE) % 25 * 4 + 1 )))
TEST_DOMAIN ?= $(shell echo $$(( $(PLACE) % 25 * 4 + 2 )))
export ROS_AUTOMATIC_DISCOVERY_RANGE := LOCALHOST
unexport ROS_LOCALHOST_ONLY ROS_STATIC_PEERS
# A Python with ROS wheels sets this after it has set its library path; another environment must set its own.
unexport _ROS_WHEELS_BOOTSTRAP_COMPLETE

DATAROOT ?=
VERSION ?=
SCENE ?=
ARGS ?=
DEMO_OPTIONS := $(if $(DATAROOT),--dataroot '$(DATAROOT)') $(if $(VERSION),--version '$(VERSION)') \
	$(if $(SCENE),--scene '$(SCENE)')

.PHONY: help setup demo test bench bench-compare docs lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    replay camera data through ROS and the detector; writes build/demo/report.html"
	@echo "             (with real data: DATAROOT=... VERSION=v1.0-mini SCENE=scene-0061)"
	@echo "make test    run the tests (ARGS='-k name' selects some, ARGS='-n 0' uses one process)"
	@echo "make bench   run the benchmarks; ends with ratios of the engines"
	@echo "make bench-compare  compare these ratios with the committed ones of this kind of processor"
	@echo "make docs    generate the reference pages in docs/reference"
	@echo "make lint    run ruff and mypy --strict"
	@echo "make format  format the code with ruff"
	@echo "make setup   create .venv with ROS 2 as wheels, or on top of a sourced ROS distribution"
	@echo "make clean   remove .venv and build/"
	@echo "Every target except clean runs setup first."

setup:
	@command -v $(PYTHON) > /dev/null || { echo "set-up: $(PYTHON) was not found; install Python 3.10 to 3.13" \
		"or name one with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) scripts/set_up.py

demo: setup
	@ROS_DOMAIN_ID=$(DEMO_DOMAIN) $(BIN)/python -m ftkd_ros.cli demo $(DEMO_OPTIONS) $(ARGS)

test: setup
	ROS_DOMAIN_ID=$(TEST_DOMAIN) $(BIN)/python -m pytest -n auto --maxprocesses 3 --dist loadfile $(ARGS)

bench: setup
	ROS_DOMAIN_ID=$(DEMO_DOMAIN) $(BIN)/python -m benchmarks.run $(ARGS)
	$(BIN)/python -m benchmarks.ratios

bench-compare: setup
	$(BIN)/python -m benchmarks.ratios --compare $(ARGS)

docs: setup
	$(BIN)/python -m scripts.make_docs $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build
