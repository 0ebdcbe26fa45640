# `make run` and `make test` need Python 3.11 or 3.12 with venv, and the package registry.

PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3,$(shell $(p) -c \
	'import sys; print("$(p)") if (3, 11) <= sys.version_info < (3, 13) else 0' 2>/dev/null | grep python)))
BIN := .venv/bin
BENCH_PYTHON ?= $(BIN)/python
LOCK := $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-annotate --custom-compile-command "make lock"
export PYTHONUNBUFFERED := 1
# Hundreds of processes start here: each would compile what the first one has.
unexport PYTHONDONTWRITEBYTECODE
ifeq ($(TRITON),0)
WITHOUT_TRITON := -m "not triton"
else
TRITON_SERVER := .venv-triton/installed
endif

.PHONY: run test lint format lock candidate prove-flights prove-flight-release prove-no-skew prove-feast-parity prove-no-foreign-values \
	prove-redis-outage prove-triton-outage prove-batcher prove-two-doors prove-release-state prove-feedback \
	prove-repository prove-hostile-models prove-reload prove-admin-races prove-tables prove-comparison prove-shadow prove-release prove-release-decider prove-evidence bench bench-features \
	bench-start bench-gpu bench-isolated bench-workers bench-shadow bench-routing clean

run: .venv/train.installed  ## install, build the feature history, train, publish, serve on :8000
	@$(BIN)/python -m feature_repo.history
	@$(BIN)/hikyaku up

test: .venv/dev.installed $(TRITON_SERVER)  ## install and run the tests; TRITON=0 leaves those with a Triton out
	@$(BIN)/python -m feature_repo.history
	@$(if $(WITHOUT_TRITON),echo "• TRITON=0: the tests against a real Triton are left out")
	@$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(WITHOUT_TRITON) $(PYTEST)

lint: .venv/dev.installed  ## formatting, lint, types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: .venv/dev.installed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

prove-no-skew: .venv/train.installed  ## replay 20,000 flights of September to December through HTTP
	@$(BIN)/python -m feature_repo.history
	@$(BIN)/hikyaku evaluate flight_delay --start 2013-09-01T00:00:00-04:00 --every-days 5 --min-auc 0.745

prove-feast-parity: .venv/dev.installed  ## read 320 random feature repositories as Feast's SDK does
	@$(BIN)/python -m loadtests.prove_feast_parity

prove-no-foreign-values: .venv/train.installed  ## a million reads while Redis misbehaves and readers leave
	@$(BIN)/python -m loadtests.prove_no_foreign_values $(PROVE)

prove-redis-outage: .venv/train.installed  ## answers under load while Redis is gone for 30 s, in three ways
	@$(BIN)/python -m loadtests.prove_redis_outage $(PROVE)

prove-triton-outage: .venv/dev.installed .venv-triton/installed  ## answers under load while Triton is gone for 30 s
	@$(BIN)/python -m loadtests.prove_triton_outage $(PROVE)

prove-two-doors: .venv/dev.installed  ## 50,000 requests of all kinds through the protocol and through ASGI
	@$(BIN)/python -m loadtests.prove_two_doors $(PROVE)

prove-reload: .venv/dev.installed  ## 500 reloads under load, every answer held against an oracle
	@$(BIN)/python -m loadtests.prove_reload $(PROVE)

prove-admin-races: .venv/dev.installed  ## 32 operators load, unload and roll back at the same time
	@$(BIN)/python -m loadtests.prove_admin_races $(PROVE)

prove-shadow: .venv/train.installed  ## what callers feel of a candidate that hangs, crashes, grows or is slow
	@$(BIN)/python -m loadtests.prove_shadow --control $(PROVE)

prove-release: .venv/dev.installed  ## releases under load: 50 that are as good, a dozen that are not, 100 rollbacks
	@$(BIN)/python -m loadtests.prove_release --parts same faulty rollback $(PROVE)

prove-release-decider: .venv/dev.installed  ## who decides is killed 100 times, Redis is lost and flushed, a newer release joins
	@$(BIN)/python -m loadtests.prove_release --parts decider $(PROVE)

prove-repository: .venv/dev.installed  ## publishers killed before every write, 20,000 damaged versions; needs strace
	@$(BIN)/python -m loadtests.prove_repository $(PROVE)

prove-hostile-models: .venv/dev.installed  ## 139 hostile models are refused, the server answering throughout
	@$(BIN)/python -m loadtests.prove_hostile_models $(PROVE)

candidate: .venv/train.installed  ## train flight_delay through September too and publish that beside the champion
	@$(BIN)/python -m feature_repo.history
	@$(BIN)/python -m loadtests.flight_versions

prove-flights: .venv/train.installed  ## a candidate beside the champion on October to December, then the truth
	@$(BIN)/python -m feature_repo.history
	@$(BIN)/python -m loadtests.prove_flights $(PROVE)

bench: .venv/train.installed  ## ours beside a bare echo and its peers; BENCH=--quick leaves the peers out
	@$(BIN)/python -m loadtests.bench $(BENCH)

prove-release-state: .venv/dev.installed  ## changes of the release state while Redis and the way to it misbehave
	@$(BIN)/python -m loadtests.prove_release_state $(PROVE)

prove-comparison: .venv/dev.installed  ## the comparison against its pairs, workers, Redis and service being killed
	@$(BIN)/python -m loadtests.prove_comparison $(PROVE)

prove-evidence: .venv/dev.installed  ## how often a canary is decided wrongly, and how soon rightly
	@$(BIN)/python -m loadtests.prove_evidence $(PROVE)

prove-tables: .venv/dev.installed  ## tables of workers while the store and the workers misbehave
	@$(BIN)/python -m loadtests.prove_tables $(PROVE)

prove-flight-release: .venv/train.installed  ## a good and a broken candidate are released by the service on October to December
	@$(BIN)/python -m feature_repo.history
	@$(BIN)/python -m loadtests.prove_flight_release $(PROVE)

prove-feedback: .venv/dev.installed  ## a million labels told while workers are killed, service and Redis restarted
	@$(BIN)/python -m loadtests.prove_feedback $(PROVE)

prove-batcher: .venv/dev.installed  ## every order of three requests, a million random operations, poison
	@$(BIN)/python -m loadtests.prove_batcher --orders
	@$(BIN)/python -m loadtests.prove_batcher $(PROVE)
	@$(BIN)/python -m loadtests.prove_batcher --poison 0.01 --operations 260000

bench-features: .venv/train.installed  ## feature reads beside Feast's SDK and beside bare hiredis
	@$(BIN)/python -m loadtests.bench_features $(BENCH)

bench-start: .venv/train.installed  ## from exec to ready, and memory; needs `make run` beside it
	@$(BIN)/python -m loadtests.bench_start $(BENCH)

bench-gpu: .venv/train.installed  ## batches of an MLP on a GPU (its docstring says what it needs)
	@$(BENCH_PYTHON) -m loadtests.bench_gpu $(BENCH)

bench-isolated: .venv/train.installed  ## what a process of its own costs an execution
	@$(BIN)/python -m loadtests.bench_isolated $(BENCH)

bench-workers: .venv/train.installed  ## several workers: throughput, processor time, evenness
	@$(BIN)/python -m loadtests.bench_workers $(BENCH)

bench-shadow: .venv/train.installed  ## what showing a candidate everything costs
	@$(BIN)/python -m loadtests.bench_shadow $(BENCH)

bench-routing: .venv/dev.installed  ## what routing costs a request while a version is released
	@$(BIN)/python -m loadtests.bench_routing $(BENCH)

lock: .venv/bootstrap.installed  ## resolve the newest versions that pyproject.toml allows
	@for group in dev train service service-gpu; do \
		case $$group in \
			dev) extras="--extra cpu --extra triton --extra s3 --extra train --extra dev";; \
			train) extras="--extra cpu --extra train --constraint requirements/dev.txt";; \
			service) extras="--extra cpu --extra triton --constraint requirements/dev.txt";; \
			service-gpu) extras="--extra gpu --extra triton --constraint requirements/dev.txt";; \
		esac; \
		$(LOCK) $$extras pyproject.toml -o requirements/$$group.txt || exit 1; \
	done
	@for group in bootstrap triton-server bench-bentoml bench-litserve bench-mlserver bench-mosec \
		bench-ray bench-plot; do \
		$(LOCK) --group pyproject.toml:$$group -o requirements/$$group.txt || exit 1; \
	done

clean:  ## remove everything that the two commands made
	rm -rf .venv .venv-triton .hikyaku feature_repo/data models/*/[0-9]* models/*/CURRENT models/*/config.pbtxt

.venv/bootstrap.installed: requirements/bootstrap.txt
	@test -n "$(PYTHON)" || { echo "Hikyaku needs Python 3.11 or 3.12; set PYTHON=/path/to/python"; exit 1; }
	@echo "• environment: .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv || { echo "The venv module is missing: on Debian, apt-get install python3-venv"; exit 1; }
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
	@touch $@

.venv/%.installed: requirements/%.txt pyproject.toml .venv/bootstrap.installed
	@echo "• installing requirements/$*.txt"
	@$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements/$*.txt
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# It cannot share an environment with the service: it executes models with numpy 1.26.
.venv-triton/installed: requirements/triton-server.txt loadtests/triton_environment.py .venv/bootstrap.installed
	@echo "• a real Triton server for the tests: .venv-triton, 370 MB (TRITON=0 does without)"
	@$(BIN)/uv venv -q --allow-existing --python $(BIN)/python .venv-triton
	@$(BIN)/uv pip install -q --python .venv-triton/bin/python --require-hashes -r requirements/triton-server.txt
	@$(BIN)/python -m loadtests.triton_environment .venv-triton
	@touch $@
