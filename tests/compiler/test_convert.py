"""Sophgo's compiler in its own Python 3.10: one stage from ONNX to a bmodel that computes the same in the simulator."""
import numpy as np
import pytest

from compiler.convert import convert
from compiler.errors import CompilerError
from compiler.toolchain import Toolchain
from engines.assembly import Source
from engines.devices import find_devices
from tests.conftest import need
from tools.install import DEMO_ONNX, PACK


@pytest.fixture(scope="module")
def toolchain():
    need((DEMO_ONNX / "vae_encoder.onnx").exists(), "the demo model is not exported: run 'python tools/install.py host'")
    try:
        return Toolchain.install()
    except CompilerError as error:
        need(False, str(error))


def test_a_stage_compiles_and_agrees_with_onnx(toolchain, tmp_path):
    path = convert(DEMO_ONNX / "vae_encoder.onnx", "bm1684x", "F32", tmp_path / "encoder.bmodel", toolchain=toolchain)
    assert [entry.name for entry in tmp_path.iterdir()] == ["encoder.bmodel"], "nothing else is left behind"
    devices = find_devices(None, PACK)
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)
    compiled, reference = (Source.open(file.name, file, [file.parent]).vae_encoder(devices, "auto", lambda: None)
                           for file in (path, DEMO_ONNX / "vae_encoder.onnx"))
    assert "BM1684X" in compiled.describe()
    np.testing.assert_allclose(compiled(picture), reference(picture), atol=1e-2)


def test_a_failed_compile_is_one_sentence_and_leaves_no_file(toolchain, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"not a network")
    with pytest.raises(CompilerError, match="model_transform.py failed with exit code") as error:
        convert(tmp_path / "broken.onnx", "bm1684x", "F32", tmp_path / "out.bmodel", toolchain=toolchain)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.bmodel")) and not list(tmp_path.glob(".compiling-*"))


@pytest.mark.parametrize("chip,precision,words", [
    ("bm1688", "F32", "No chip 'bm1688' is known"),
    ("bm1684", "F16", "bm1684 cannot compute in 'F16'; it offers F32"),
    ("bm1684x", "F32", "There is no ONNX file"),
])
def test_what_cannot_be_compiled_is_said_before_anything_starts(tmp_path, chip, precision, words):
    with pytest.raises(CompilerError, match=words):
        convert(tmp_path / "absent.onnx", chip, precision, tmp_path / "out.bmodel", toolchain=None)
