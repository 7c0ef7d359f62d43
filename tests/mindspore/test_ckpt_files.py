"""MindSpore itself writes and reads the .ckpt files that the reader without MindSpore takes."""
import subprocess
from pathlib import Path

import pytest

from tests.conftest import need
from tests.helpers.sdxl_models import TinySDXL, write_ckpt
from tools.install import MINDSPORE

ROOT = Path(__file__).resolve().parents[2]
PYTHON = MINDSPORE / "bin" / "python"

COMPARE = '''
import sys
from pathlib import Path
import mindspore as ms
import numpy as np
from engines.sdxl.checkpoint import PARTS, open_checkpoint
from engines.sdxl.ckptfile import read_ckpt

path, written = map(Path, sys.argv[1:])
theirs, ours = ms.load_checkpoint(str(path)), read_ckpt(path)
assert list(theirs) == list(ours)
for name, parameter in theirs.items():
    array = ours[name].read()
    if parameter.dtype == ms.bfloat16:
        array, parameter = (array.astype(np.uint32) << 16).view(np.float32), parameter.astype(ms.float32)
    assert array.shape == parameter.shape and np.array_equal(array, parameter.asnumpy()), name
ms.save_checkpoint([{"name": name, "data": parameter} for name, parameter in theirs.items()], str(written),
                   crc_check="crc" in written.name, append_dict={"epoch_num": 3, "note": "a text"})
first, second = ({parameter.name: parameter.read() for part in PARTS for parameter in open_checkpoint(file).parameters(part)}
                 for file in (path, written))
assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
print("the same")
'''


@pytest.mark.parametrize("dtype, piece, written", [("float32", 100_000, "a.ckpt"), ("bfloat16", 512 << 20, "crc.ckpt")])
def test_mindspore_reads_and_writes_the_same(tmp_path, dtype, piece, written):
    need(PYTHON.exists(), "MindSpore is not installed: run 'python tools/install.py mindspore'")
    path = write_ckpt(TinySDXL(rows=500), tmp_path / "tiny.ckpt", dtype, piece=piece)
    run = subprocess.run([PYTHON, "-c", COMPARE, path, tmp_path / written], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.endswith("the same\n"), run.stderr
