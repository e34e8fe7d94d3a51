# Headroom: `make demo` and `make test` are the two commands to know; `make help` lists all.
SHELL := /bin/bash
.DEFAULT_GOAL := help
CARGO ?= cargo
DEMO_ARGS ?=
BENCH_ARGS ?=
FORECAST_ARGS ?=
# Cargo features beyond the default for `test`, `soak` and `lint`, such as --features hostd/lstm, which CI turns on.
FEATURES ?=

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

.PHONY: demo
demo: ## the whole product in three minutes: forecast, migrate before contention, verify (DEMO_ARGS="--json FILE")
	@scripts/install-deps.sh build
	@$(CARGO) build --release --locked --package vmm --package hostd --bins
	@target/release/headroom demo $(DEMO_ARGS)

.PHONY: build
build: ## headroom, hostd and headroom-vmm in target/release
	@scripts/install-deps.sh build
	@$(CARGO) build --release --locked --package vmm --package hostd --bins

# Areas run one after the other, and each test alone: they run real machines, and two would compete for the same cores.
# Every cargo call names the whole workspace: with another selection cargo would unify features anew and build crates twice.
AREAS := $(patsubst tests/%/main.rs,--test %,$(wildcard tests/*/main.rs))

.PHONY: test
test: ## unit tests, then real machines, migrations and failures (needs root and /dev/kvm; says so when it has not)
	@scripts/install-deps.sh test
	@[ -e /dev/kvm ] || echo "/dev/kvm is missing: the tests that run machines are skipped (with HEADROOM_REQUIRE_KVM=1 they fail)"
	@tests/linux/build.sh
	@$(CARGO) build --locked $(FEATURES) --workspace --bins --tests
	@$(CARGO) test --locked $(FEATURES) --workspace --exclude tests
	@RUST_TEST_THREADS=1 $(CARGO) test --locked $(FEATURES) --workspace $(AREAS)

SOAK_MOVES ?= 200
.PHONY: soak
soak: ## many migrations in a row under load, oracles and leaks checked (SOAK_MOVES=200; needs root and /dev/kvm)
	@scripts/install-deps.sh test
	@$(CARGO) build --locked $(FEATURES) --workspace --bins --tests
	@HEADROOM_REQUIRE_KVM=1 HEADROOM_SOAK_MOVES=$(SOAK_MOVES) $(CARGO) test --locked $(FEATURES) --workspace --test soak -- --nocapture

FUZZ_SECONDS ?= 60
.PHONY: fuzz
fuzz: ## libFuzzer over every decoder, FUZZ_SECONDS=60 for each (needs cargo-fuzz, and no nightly compiler)
	@scripts/install-deps.sh build
	@scripts/fuzz.sh $(FUZZ_SECONDS)

.PHONY: lint
lint: ## rustfmt, clippy without warnings, documentation without broken links, licences
	@scripts/install-deps.sh build
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --locked $(FEATURES) --workspace --all-targets -- -D warnings
	@cd guest/image && $(CARGO) fmt --check && $(CARGO) clippy --locked --release --target x86_64-unknown-linux-gnu -- -D warnings
	@RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" $(CARGO) doc --locked $(FEATURES) --workspace --no-deps --quiet
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny --offline check licenses bans sources; \
	 else echo "cargo-deny is not installed: licences and sources were not checked (cargo install --locked cargo-deny)"; fi

.PHONY: bench
bench: ## downtime against QEMU, start-up, memory, cost of forecasts; writes docs/benchmarks*.md (BENCH_ARGS="--runs 5")
	@scripts/install-deps.sh bench
	@$(CARGO) build --release --locked --workspace --bins
	@target/release/downtime --scenario all --peer qemu --report docs/benchmarks.md $(BENCH_ARGS)
	@target/release/forecast --report docs/benchmarks-forecast.md $(FORECAST_ARGS)

.PHONY: clean
clean: ## remove what was built
	@$(CARGO) clean
