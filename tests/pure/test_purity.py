"""Arrows point one way: engines know neither ComfyUI nor torch, and looking at files and devices starts nothing."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

from engines.workers import _sources

ROOT = Path(__file__).resolve().parents[2]
HOST = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "server", "nodes", "latent_preview", "torch"}
VENDOR = {"sophon", "onnxruntime", "mindspore", "mindone", "tpu_mlir"}
ADAPTERS = ROOT / "nodes" / "adapters"


def imports(path: Path) -> set[str]:
    """Top-level names of the absolute imports of a file, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "engines").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_engines_know_no_host_and_vendors_stay_in_runtimes(path):
    assert not imports(path) & HOST
    if "runtimes" not in path.parts:
        assert not imports(path) & VENDOR


@pytest.mark.parametrize("path", sorted((ROOT / "nodes").glob("*.py")), ids=lambda p: p.name)
def test_nodes_are_thin_and_leave_comfy_objects_to_the_adapters(path):
    allowed = {"comfy", "comfy_api", "folder_paths"}     # sampler names, the schema, model folders
    assert imports(path) & (HOST | VENDOR | {"numpy"}) <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "nodes").glob("*.py")), ids=lambda p: p.name)
def test_nodes_import_what_runs_when_it_runs(path):
    """The pack may add 50 ms to ComfyUI's start (bench/import_cost.py); the adapters and what they need take 100."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    taken = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.level}
    assert {name for name in taken if name and name.startswith("adapters")} <= {"adapters.choices", "adapters.host"}


def neighbours(path: Path) -> set[Path]:
    """The files of this project that a file imports relatively."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            found |= {folder / "__init__.py", folder.with_suffix(".py"), *(folder / f"{a.name}.py" for a in node.names)}
    return {file for file in found if file.exists()}


@pytest.mark.parametrize("runtime", [path.parent.name for path in (ROOT / "engines" / "runtimes").glob("*/__init__.py")])
def test_a_runtime_that_is_a_package_is_sent_with_all_it_imports(runtime):
    sent = {ROOT / name for name in _sources(runtime)}
    reached, ahead = set(), {path for path in sent if path.parent.name == runtime}
    while ahead:
        path = ahead.pop()
        assert path in sent
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
        assert imports(path) <= sys.stdlib_module_names | {"numpy"} | (VENDOR if path.parent.name == runtime else set())
        reached.add(path)
        ahead |= neighbours(path) - reached


@pytest.mark.parametrize("path", sorted((ROOT / "engines" / "runtimes").glob("*.py")), ids=lambda p: p.name)
def test_what_a_worker_runs_is_python_3_8_and_stands_alone(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]


def test_reading_files_and_finding_devices_imports_nothing_heavy():
    code = ("import sys, pathlib; from engines import assembly, devices; "
            "devices.find_devices(None, pathlib.Path('.')); print(*sys.modules)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(run.stdout.split()) & (HOST | VENDOR | {"execnet", "flatbuffers", "onnx"})
