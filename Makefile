# make help says what there is. Every target first brings .venv up to date, which takes no time where nothing changed.

PYTHON ?= python3
BIN := .venv/bin

# All DDS traffic stays on this machine, and each checkout talks on domains of its own: of 1 to 100, one for the demo and
# the next three for the processes of the tests (tests/conftest.py), so that none hears another nor another checkout's.
PLACE := $(shell printf '%s' '$(CURDIR)' | cksum | cut -d ' ' -f 1)
DEMO_DOMAIN ?= $(shell echo $$(( $(PLACE) % 25 * 4 + 1 )))
TEST_DOMAIN ?= $(shell echo $$(( $(PLACE) % 25 * 4 + 2 )))
export ROS_AUTOMATIC_DISCOVERY_RANGE := LOCALHOST
unexport ROS_LOCALHOST_ONLY ROS_STATIC_PEERS
# A Python with ROS wheels marks its children as prepared; another environment's Python must prepare itself.
unexport _ROS_WHEELS_BOOTSTRAP_COMPLETE

DATAROOT ?=
VERSION ?=
SCENE ?=
ARGS ?=
DEMO_OPTIONS := $(if $(DATAROOT),--dataroot '$(DATAROOT)') $(if $(VERSION),--version '$(VERSION)') \
	$(if $(SCENE),--scene '$(SCENE)')

.PHONY: help setup demo test bench docs lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    set up, run camera data through ROS and the detector, write build/demo/report.html"
	@echo "             (on real data: DATAROOT=... VERSION=v1.0-mini SCENE=scene-0061)"
	@echo "make test    set up and run the tests (ARGS='-k name' for some of them, ARGS='-n 0' in one process)"
	@echo "make bench   set up and run the benchmarks"
	@echo "make docs    set up, then write docs/reference from the code"
	@echo "make lint    set up, then ruff and mypy --strict"
	@echo "make format  set up, then let ruff format the code"
	@echo "make setup   only the set-up: .venv with ROS 2 as wheels, or on a sourced ROS distribution"
	@echo "make clean   remove .venv and build/"

setup:
	@command -v $(PYTHON) > /dev/null || { echo "set-up: $(PYTHON) was not found; install Python 3.10 to 3.12" \
		"or name one with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) scripts/set_up.py

demo: setup
	@ROS_DOMAIN_ID=$(DEMO_DOMAIN) $(BIN)/python -m ftkd_ros.cli demo $(DEMO_OPTIONS) $(ARGS)

test: setup
	ROS_DOMAIN_ID=$(TEST_DOMAIN) $(BIN)/python -m pytest -n auto --maxprocesses 3 --dist loadfile $(ARGS)

bench: setup
	ROS_DOMAIN_ID=$(DEMO_DOMAIN) $(BIN)/python -m benchmarks.run $(ARGS)

docs: setup
	$(BIN)/python -m scripts.make_docs $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict ftkd_core ftkd_ros

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build
