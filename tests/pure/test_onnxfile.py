"""Reading ONNX files without the onnx package; the package writes the files here."""
import random
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.network import ModelFileError, Network, Port
from engines.onnxfile import external_files, read_onnx


def model(weight_inputs: bool = False, nodes: int = 1):
    weight = onnx.numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, None]),
              helper.make_tensor_value_info("t", TensorProto.INT64, [1]),
              helper.make_tensor_value_info("s", TensorProto.FLOAT16, [])]
    if weight_inputs:
        inputs.insert(0, helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ["batch", 3])]
    body = [helper.make_node("Identity", ["x"], [f"n{index}"], name=f"a node {index}") for index in range(nodes)]
    graph = helper.make_graph(body, "tiny", inputs, outputs, [weight], doc_string="text")
    return helper.make_model(graph, producer_name="pytorch", producer_version="2.13")


def save(path, made):
    path.write_bytes(made.SerializeToString())
    return path


def refusal(path) -> str:
    with pytest.raises(ModelFileError) as caught:
        read_onnx(path)
    message = str(caught.value)
    assert message.startswith(f"{path.name}: ") and message.endswith(".") and "\n" not in message
    return message


@pytest.mark.parametrize("weight_inputs", [False, True])
def test_reads_ports_and_facts(tmp_path, weight_inputs):
    path = save(tmp_path / "tiny.onnx", model(weight_inputs))
    read = read_onnx(path)
    assert read.networks == (Network(
        "tiny", (Port("x", "float32", ((-1, 4, -1),)), Port("t", "int64", ((1,),)), Port("s", "float16", ((),))),
        (Port("y", "bfloat16", ((-1, 3),)),), dynamic=True),)
    assert (read.format, read.chip, read.compiler) == ("onnx", None, "pytorch 2.13")
    assert (read.file_bytes, read.device_bytes) == (path.stat().st_size, 0)


def test_weights_beside_the_file_count(tmp_path):
    path = tmp_path / "tiny.onnx"
    onnx.save_model(model(), path, save_as_external_data=True, location="tiny.onnx_data", size_threshold=0)
    beside = tmp_path / "tiny.onnx_data"
    assert external_files(path) == (beside,)
    assert read_onnx(path).file_bytes == path.stat().st_size + beside.stat().st_size
    beside.unlink()
    assert "'tiny.onnx_data', which is not beside it" in refusal(path)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "..\\secret", "link"])
def test_weights_may_not_lie_outside_the_folder(tmp_path, location):
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"1234")
    (folder / "link").symlink_to(tmp_path / "secret")
    made = model()
    weight = made.graph.initializer[0]
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    assert "outside its folder" in refusal(save(folder / "tiny.onnx", made))


def test_types_that_cannot_be_sent(tmp_path):
    made = model()
    made.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    assert "'x' is no tensor of a type that can be sent" in refusal(save(tmp_path / "a.onnx", made))
    made.graph.input[0].type.Clear()
    refusal(save(tmp_path / "b.onnx", made))


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\xff" * 100, b"not an ONNX file at all", b"\x3a\x00",
                                     b"\x38\x01", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"])
def test_what_is_no_onnx(tmp_path, content):
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    assert "ONNX model" in refusal(path)


def test_missing_file(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.onnx")


def test_many_records_end_soon(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"\x08\x01" * 1_000_000)
    began = time.perf_counter()
    assert "more than 500,000 records" in refusal(path)
    assert time.perf_counter() - began < 5


def test_large_weights_are_skipped(tmp_path):
    """A file of 3 GB (sparse) is read by its structure alone."""
    graph = model().graph.SerializeToString()
    weight = 3 << 30
    raw = b"\x4a" + varint(weight)                          # TensorProto.raw_data
    initializer = b"\x2a" + varint(len(raw) + weight)       # GraphProto.initializer
    path = tmp_path / "big.onnx"
    with path.open("wb") as file:
        file.write(b"\x3a" + varint(len(graph) + len(initializer) + len(raw) + weight) + graph + initializer + raw)
        file.truncate(file.tell() + weight)
    began = time.perf_counter()
    assert [port.name for port in read_onnx(path).networks[0].inputs] == ["x", "t", "s"]
    assert time.perf_counter() - began < 1


def varint(number: int) -> bytes:
    low = bytes([number & 0x7F | (0x80 if number > 0x7F else 0)])
    return low if number <= 0x7F else low + varint(number >> 7)


def test_damage_anywhere_is_a_sentence_or_harmless(tmp_path):
    rng = random.Random(1)
    whole = model(weight_inputs=True).SerializeToString()
    path = tmp_path / "x.onnx"
    refused = 0
    for turn in range(600):
        data = bytearray(whole)
        if turn % 3 == 0:
            del data[rng.randrange(len(data)):]
        else:
            for _ in range(rng.choice((1, 1, 4, 30))):
                data[rng.randrange(len(data))] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        path.write_bytes(data)
        try:
            read_onnx(path)
        except ModelFileError as why:
            assert str(why).startswith("x.onnx: ")
            refused += 1
    assert refused > 200
