# The targets of Threefold. Overrides for any of them go into ARGS, for example: make ppo ARGS="ppo.kl_coef=0.1"
PYTHON ?= python3
VENV ?= .venv
THREEFOLD = $(VENV)/bin/threefold
STAGES = tokenizer pretrain sft comparisons reward dpo ppo evaluate

# a variable on the command line that is none of these would be dropped: make ppo kl_coef=0.1
TYPED := $(sort $(foreach name,$(filter-out PYTHON VENV ARGS SHELL,$(.VARIABLES)),$(if $(filter command,$(origin $(name))),$(name))))
ifneq ($(TYPED),)
OVERRIDES := $(strip $(ARGS) $(foreach name,$(TYPED),$(name)=$(value $(name))))
$(error overrides go into ARGS: make $(MAKECMDGOALS) ARGS="$(OVERRIDES)"; variables of the environment stand before make)
endif

.DEFAULT_GOAL := help
.PHONY: help install demo arithmetic $(STAGES) frontier sweep report submit status cancel label chat dashboard sync test \
	test-all test-slurm bench bench-ppo bench-sampler bench-labels lint docs clean

help: ## list the targets
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

# torch comes first: on a machine without a GPU the constraints file then keeps its CPU build
$(VENV)/.installed: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

install: $(VENV)/.installed ## create .venv and install the pinned packages

demo: install ## run the whole chain on the embedded conversations (about 8 minutes on two cores)
	$(THREEFOLD) run experiment=demo $(ARGS)

arithmetic: install ## learn sums and differences with a reward by rule (about 6 minutes on one core)
	$(THREEFOLD) run experiment=arithmetic $(ARGS)

tokenizer: install ## train the tokenizer
pretrain: install ## pretrain the base model
sft: install ## fine-tune the base model on replies
comparisons: install ## sample pairs of replies and label them
reward: install ## train the reward model
dpo: install ## train with DPO
ppo: install ## train with PPO
evaluate: install ## compare the models on held-out prompts
$(STAGES):
	$(THREEFOLD) run target=$@ $(ARGS)

frontier: install ## push best-of-n, DPO and PPO until the judge falls, three seeds (about 20 minutes)
	$(THREEFOLD) frontier $(ARGS)

# each override is quoted, as Hydra's sweep syntax has parentheses; none may hold a space
sweep: install ## make a run with several values of some keys, or search them: ARGS="dpo.beta=0.05,0.1 seed=1,2,3"
	$(THREEFOLD) sweep $(foreach override,$(ARGS),'$(override)')

report: install ## write the report of a run again from its folder
	$(THREEFOLD) report $(ARGS)

submit: install ## send what is stale to Slurm, a job for each stage, and return at once
	$(THREEFOLD) submit $(ARGS)

status: install ## show which stages are fresh, stale, queued or running, and why
	$(THREEFOLD) status $(ARGS)

cancel: install ## end the jobs of a run in Slurm
	$(THREEFOLD) cancel $(ARGS)

dashboard: install ## look at tracked runs: trackio's page, or W&B's in the terminal; ARGS=--wandb sets up W&B's workspace
	$(THREEFOLD) dashboard $(ARGS)

sync: install ## send W&B runs that were made offline
	$(THREEFOLD) sync $(ARGS)

label: install ## serve the page where people compare replies
	$(THREEFOLD) label $(ARGS)

chat: install ## talk with a model of a run in the terminal
	@$(THREEFOLD) chat $(ARGS)

test: install ## run the tests
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: install ## run the tests, the slow proofs, and those on Slurm
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slurm" $(ARGS)
	$(MAKE) test-slurm

test-slurm: install ## run a chain, a sweep, two nodes and preemption on the Slurm that answers here
	$(VENV)/bin/python -m pytest -m slurm -rs tests/slurm/test_slurm_real.py

bench: install ## compare every stage with what one would use instead: speed, share of peak, memory (about half an hour)
	$(VENV)/bin/python tests/bench/bench.py $(ARGS)

bench-ppo: install ## compare PPO with a straightforward one: speed and gain, on the demo's models (about 20 minutes)
	$(VENV)/bin/python tests/bench/bench_ppo.py $(ARGS)

bench-sampler: install ## compare the sampler with generate: tokens per second at batch 128, 32 and 1
	$(VENV)/bin/python tests/bench/bench_sampler.py $(ARGS)

bench-labels: install ## compare reward models by wrong labels and number of pairs (about 14 minutes on two cores)
	$(VENV)/bin/python tests/bench/bench_labels.py $(ARGS)

# the type checker sees no editable install, so it is given an ordinary one
lint: install ## check style and types
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	rm -rf build $(VENV)/typed && $(VENV)/bin/python -m pip install --quiet --no-deps --target $(VENV)/typed .
	cd $(VENV)/typed && ../bin/ty check --python .. threefold

docs: install ## build the documentation site into build/site; a broken link is an error
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	$(VENV)/bin/python -m sphinx --quiet --fail-on-warning --keep-going -c docs/site . build/site
	@echo "open build/site/index.html"

clean: ## remove caches and builds; runs/ stays
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
