# Two commands, each with all of its set-up. What a tool's own command says as well is not repeated here.

PYTHON ?= python3
VENV ?= .venv

.PHONY: test demo fuzz interop

test: $(VENV)/for-test
	$(VENV)/bin/pytest

# damaged checkpoints of every format, for longer than the tests can
fuzz: $(VENV)/for-test
	BRISE_FUZZ=20000 $(VENV)/bin/pytest --timeout 0 tests/model/test_foreign_fuzz.py

# the other libraries, each in an environment of its own, load what is written here and write what is read here
interop: $(VENV)/for-test
	$(VENV)/bin/python tests/interop/environments.py .interop
	BRISE_INTEROP=$(CURDIR)/.interop $(VENV)/bin/pytest --timeout 0 tests/interop

# everything is made in .cache/demo, which git ignores: what was measured there before is not measured again, what
# was committed is. Rows, table and picture are then put into results/demo
demo: $(VENV)/for-demo
	$(VENV)/bin/brise sweep --model smollm2-135m \
		--configs int8,nf4,nf4-dq,int4-g64,gptq-int4-g64,gptq-nf4,gptq-int3-g64 \
		--windows 8 --length 1024 --calibration-windows 8 --out .cache/demo
	cp .cache/demo/runs.jsonl .cache/demo/table.md .cache/demo/memory-perplexity.* results/demo

# one environment, which each command brings up to what it needs; of the extras only ray is left out, which is large: its
# test says that it is skipped
$(VENV)/for-demo: EXTRAS = demo,report
$(VENV)/for-test: EXTRAS = demo,report,peers,tasks,test,lint
$(VENV)/for-%: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@
