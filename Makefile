# The one entry point: people and CI call make and nothing else. `make` alone lists what there is.
# Only `make fix` changes files of the source tree.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# A toolchain that rustup has just installed is not on PATH yet; a distribution's cargo that is, is too old.
export PATH := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH)

# Where the binaries are. CARGO_TARGET_DIR is honoured.
BIN := $(abspath $(or $(CARGO_TARGET_DIR),target))/debug
# The seeds that `make test` and `make sim` run: FROM, FROM + 1, … (SEEDS of them).
SEEDS ?= 500
FROM ?= 0
# How `make dist` compiles: `release`, or `dev` when a container is wanted sooner than it need be fast.
DIST_PROFILE ?= release

LOCKED := --locked
# nextest where it is installed (.config/nextest.toml); the same tests by `cargo test` where it is not.
NEXTEST := $(shell PATH='$(PATH)' command -v cargo-nextest)
TEST := $(if $(NEXTEST),nextest run,test --no-fail-fast)

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## install what is missing on this machine, or say how
	@deploy/scripts/setup.sh

.PHONY: build
build: setup ## compile every program of the workspace
	@cargo build $(LOCKED) --workspace --bins

.PHONY: demo
demo: build ## a whole fleet on loopback, with a live view; Ctrl-C stops all of it
	@$(BIN)/demo

.PHONY: tour
tour: build ## the fleet is put through its faults; every outcome is checked and timed
	@$(BIN)/tour

# What `make test` could not do here, a line a test (crates/core/src/shell/testing/skips.rs).
export BOTS_SKIPS := $(abspath $(or $(CARGO_TARGET_DIR),target))/skipped.txt

# Integration tests run the programs that `build` has put into $(BIN), so all is compiled first, in one go. What was skipped is
# told last, however the tests end: a skip is no pass.
.PHONY: test
test: build ## every test: machines, conformance, simulation, and real servers; at the end, what was skipped and why
	@rm -f $(BOTS_SKIPS)
	@deploy/scripts/setup.sh --with-varnish --with-sshd || echo 'test: there is no Varnish or no sshd: its test stands aside'
	@[[ -x /usr/sbin/sshd || -x /usr/local/sbin/sshd ]] || echo 'fetches over ssh: there is no sshd: install openssh-server' >> $(BOTS_SKIPS)
	@status=0; $(MAKE) --silent run-tests || status=$$?; $(MAKE) --silent tell-skips; exit $$status

.PHONY: run-tests
run-tests:
	@$(if $(NEXTEST),cargo test $(LOCKED) --workspace --doc --quiet)
	@RUST_TEST_THREADS=2 cargo $(TEST) $(LOCKED) --workspace
	@$(MAKE) --silent run-sim

.PHONY: tell-skips
tell-skips:
	@[[ ! -s $(BOTS_SKIPS) ]] || { echo 'SKIPPED, and so NOT tested here:'; sort -u $(BOTS_SKIPS) | sed 's/^/  /'; }
	@rm -f $(BOTS_SKIPS)

.PHONY: sim
sim: setup ## the simulator: SEEDS=10000 seeds, the first of them FROM=0
	@cargo build $(LOCKED) --package bots-sim --bin sim
	@$(MAKE) --silent run-sim

.PHONY: run-sim
run-sim:
	@$(BIN)/sim --seeds $(SEEDS) --from $(FROM)

# How long `make chaos` and `make soak` go on, what decides the faults of chaos, how commits wait for replicas (async, on,
# quorum), and FAILSAFE=1 for failsafe mode.
MINUTES ?= $(if $(filter soak,$(MAKECMDGOALS)),60,2)
SEED ?= 1
MODE ?= async
FAILSAFE ?=

.PHONY: chaos
chaos: build ## kills, freezes, cuts off and starves all parts under writing clients: MINUTES=2 SEED=1 MODE=async|on|quorum|takeover FAILSAFE=1
	@$(BIN)/chaos --seconds $$(( $(MINUTES) * 60 )) --seed $(SEED) --mode $(MODE) $(if $(filter-out 0 no,$(FAILSAFE)),--failsafe)

.PHONY: torture
torture: build ## content and web bots are killed at every step of a publication, under readers: ROUNDS=500 SEED=1 (half an hour)
	@$(BIN)/torture --seed $(SEED) $(if $(filter command line environment,$(origin ROUNDS)),--rounds $(ROUNDS))

.PHONY: soak
soak: build ## a Postgres cluster on a machine without time, and a disk without: no failover that was not asked for: MINUTES=60
	@$(BIN)/soak --minutes $(MINUTES)

.PHONY: bench-idle
bench-idle: build ## what each bot costs when nothing happens
	@$(BIN)/bench-idle

# How often `make bench-edge` has the leader change in front of our edge bot and of a stock HAProxy, and of the former alone.
FLIPS ?= 200

.PHONY: bench-edge
bench-edge: build ## how soon a HAProxy routes to a new leader: our edge bot beside health checks: ROUNDS=10 FLIPS=200 (four minutes)
	@$(BIN)/bench-edge --flips $(FLIPS) $(if $(filter command line environment,$(origin ROUNDS)),--rounds $(ROUNDS))

.PHONY: bench-content
bench-content: build ## from git push to the last of eight web bots, told by a webhook and found by a poll (three minutes)
	@$(BIN)/bench-content

.PHONY: bench-web
bench-web: build ## our static and app modes beside nginx, with wrk (both are installed for it): ROUNDS=7 (five minutes)
	@deploy/scripts/setup.sh --with-nginx
	@cargo build $(LOCKED) --release --package web-bot
	@$(BIN)/bench-web --web-bot $(dir $(BIN))release/web-bot $(if $(filter command line environment,$(origin ROUNDS)),--rounds $(ROUNDS))

.PHONY: bench-load
bench-load: build ## how soon an idle bot answers under load, and whether a request is lost on the way
	@$(BIN)/bench-load

# How often `make bench-failover` does every fault to every cluster, and which rows of its table it measures (ONLY=a,b; the
# others stay as an earlier run left them).
ROUNDS ?= 3
ONLY ?=

.PHONY: bench-failover
bench-failover: build ## our Postgres bots beside Patroni, under the same faults: ROUNDS=3 (half an hour) ONLY=row,row
	@cargo build $(LOCKED) --release --package postgres-bot --package botctl
	@BOTS_BIN_DIR=$(dir $(BIN))release $(BIN)/bench-failover --rounds $(ROUNDS) $(if $(ONLY),--only $(ONLY))

.PHONY: verify
verify: setup ## the quick gate, which writes nothing: format, lints, purity, documents
	@deploy/scripts/verify.sh

.PHONY: fix
fix: setup ## format, apply the lints' suggestions, rewrite transcripts and generated documents
	@cargo fmt --all
	@cargo clippy $(LOCKED) --workspace --all-targets --fix --allow-dirty --allow-staged
	@cargo fmt --all
	@REWRITE=1 cargo test $(LOCKED) --package postgres-bot --package content-bot --package web-bot --package edge-bot --test machine
	@REWRITE=1 cargo test $(LOCKED) --package botctl --bin botctl

.PHONY: doc
doc: setup ## the reference of the libraries, in target/doc
	@cargo doc $(LOCKED) --workspace --no-deps --lib

.PHONY: dist
dist: setup ## the programs that are deployed, in target/dist/bin
	@deploy/scripts/dist.sh $(DIST_PROFILE)

.PHONY: compose-demo
compose-demo: ## the fleet in containers with their own addresses
	@deploy/scripts/compose.sh demo

.PHONY: compose-down
compose-down: ## stop those containers and forget their data
	@deploy/scripts/compose.sh down

.PHONY: compose-test
compose-test: ## the containers' own test: push content, kill the primary, lose nothing
	@deploy/scripts/compose-test.sh

.PHONY: clean
clean: ## remove everything that was built
	@cargo clean
	@rm -rf target/dist
