# Two commands, each with all of its set-up. What a tool's own command says as well is not repeated here.

PYTHON ?= python3
VENV ?= .venv
# everything but ray, which is large; its test says that it is skipped
EXTRAS = demo,peers,tasks,report,test,lint
STAMP = $(VENV)/installed

.PHONY: test demo fuzz interop

test: $(STAMP)
	$(VENV)/bin/pytest

# damaged checkpoints of every format, for longer than the tests can
fuzz: $(STAMP)
	BRISE_FUZZ=20000 $(VENV)/bin/pytest --timeout 0 tests/model/test_foreign_fuzz.py

# the other libraries, each in an environment of its own, load what is written here and write what is read here
interop: $(STAMP)
	$(VENV)/bin/python tests/interop/environments.py .interop
	BRISE_INTEROP=$(CURDIR)/.interop $(VENV)/bin/pytest --timeout 0 tests/interop

# everything is made in .cache/demo, which git ignores: what was measured there before is not measured again, what
# was committed is. Rows, table and picture are then put into results/demo
demo: $(STAMP)
	$(VENV)/bin/brise sweep --model smollm2-135m \
		--configs int8,nf4,nf4-dq,int4-g64,gptq-int4-g64,gptq-nf4,gptq-int3-g64 \
		--windows 8 --length 1024 --calibration-windows 8 --out .cache/demo
	cp .cache/demo/runs.jsonl .cache/demo/table.md .cache/demo/memory-perplexity.* results/demo

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@
