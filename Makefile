PYTHON ?= python3.11

.PHONY: demo test lint bench install clean

demo: ## install what is missing, boot ComfyUI, run a shipped workflow, write a PNG
	$(PYTHON) tools/install.py host
	.local/venv/bin/python -m demo.run $(if $(PROMPT),--prompt "$(PROMPT)") $(if $(SEED),--seed $(SEED))

test: ## install what is missing and run all tests
	$(PYTHON) tools/install.py dev
	.local/venv/bin/python -m pytest

lint:
	$(PYTHON) tools/install.py lint
	.local/lint/bin/ruff check .

bench: ## print this pack's costs, as ratios and counts
	$(PYTHON) tools/install.py host
	.local/venv/bin/python -m bench
