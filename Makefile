PYTHON ?= python3.11
WISHES = $(if $(PROMPT),--prompt "$(PROMPT)") $(if $(SEED),--seed $(SEED))

.PHONY: demo demo-ascend test lint bench

demo: ## install what is missing, boot ComfyUI, run a shipped workflow in Sophgo's simulator, write a PNG
	$(PYTHON) tools/install.py host
	.local/venv/bin/python -m demo.run $(WISHES)

demo-ascend: ## the same with SDXL on MindSpore
	$(PYTHON) tools/install.py host mindspore
	.local/venv/bin/python -m demo.run --workflow "Ascend SDXL text to image" --out .local/output/demo-ascend.png $(WISHES)

test: ## install what is missing and run all tests
	$(PYTHON) tools/install.py dev
	.local/venv/bin/python -m pytest

lint:
	$(PYTHON) tools/install.py lint
	.local/lint/bin/ruff check .

bench: ## print this pack's costs, as ratios and counts
	$(PYTHON) tools/install.py host
	.local/venv/bin/python -m bench
