"""Reading bmodels: what a good file says, and one sentence for every bad one."""
import random
import struct
import time

import pytest

from engines import bmodel
from engines.bmodel import read_bmodel
from engines.network import ModelFileError
from tests.helpers.bmodel_writer import (
    WILD,
    Writer,
    bmodel_bytes,
    network,
    text_encoder,
    unet_demo,
    variants,
    write_bmodel,
)


def refusal(path) -> str:
    with pytest.raises(ModelFileError) as caught:
        read_bmodel(path)
    message = str(caught.value)
    assert message.startswith(f"{path.name}: ") and message.endswith(".") and "\n" not in message
    return message


@pytest.mark.parametrize("name", WILD)
def test_reads_back_every_family(tmp_path, name):
    read = read_bmodel(write_bmodel(tmp_path / "a.bmodel", [WILD[name]]))
    assert read.networks == (WILD[name],)


def test_reads_the_facts_of_a_file(tmp_path):
    path = write_bmodel(tmp_path / "sd.bmodel", [unet_demo(), text_encoder()], chip="bm1684x", version="2.2+v1.30")
    read = read_bmodel(path)
    assert (read.format, read.chip, read.compiler, read.created) == (
        "bmodel", "BM1684X", "2.2+v1.30", "Sat Nov 22 04:00:00 2025")
    assert [net.name for net in read.networks] == ["unet_b", "text_encoder"]
    assert read.file_bytes == path.stat().st_size


def test_device_memory_is_weights_and_the_largest_scratch_and_io(tmp_path):
    first = network("a", {"x": (2, 3)}, {"y": (4,)})                    # 24 + 16 bytes of I/O
    bigger = network("a", {"x": (4, 3)}, {"y": (4,)})                   # 48 + 16
    other = network("b", {"x": (1,)}, {"y": (1,)}, {"x": "int8"})       # 1 + 4
    nets = [variants(first, bigger), other]
    apart = read_bmodel(write_bmodel(tmp_path / "a.bmodel", nets, weights=1000, scratch=5000))
    shared = read_bmodel(write_bmodel(tmp_path / "b.bmodel", nets, weights=1000, scratch=5000, shared_weights=True))
    assert apart.device_bytes == 3 * 1000 + 5000 + (48 + 16) + (1 + 4)
    assert shared.device_bytes == 1000 + 5000 + (48 + 16) + (1 + 4)


def test_dynamic_networks_say_so(tmp_path):
    net = network("n", {"x": (1, 2)}, {"y": (1, 2)}, dynamic=True)
    assert read_bmodel(write_bmodel(tmp_path / "a.bmodel", [net])).networks[0].dynamic


def test_missing_file_and_folder(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.bmodel")
    assert "no such file" in refusal(tmp_path)


@pytest.mark.parametrize("content, words", [
    (b"", "header"), (b"\0" * 63, "header"), (b"garbage " * 100, "not a bmodel"), (b"\0" * 5000, "not a bmodel"),
])
def test_what_is_no_bmodel(tmp_path, content, words):
    path = tmp_path / "x.bmodel"
    path.write_bytes(content)
    assert words in refusal(path)


def test_a_file_cut_short_is_named_as_such(tmp_path):
    data = bmodel_bytes([unet_demo()])
    path = tmp_path / "x.bmodel"
    path.write_bytes(data[:-1])
    assert f"cut short, {len(data) - 1:,} of {len(data):,} bytes" in refusal(path)


def test_a_huge_description_is_not_read(tmp_path):
    path = tmp_path / "x.bmodel"
    with path.open("wb") as file:
        file.write(struct.pack("<IIIQ", bmodel.MAGIC, 64, 2**31, 0))
        file.truncate(64 + 2**31)       # sparse: takes no room
    assert "2,147,483,648 bytes" in refusal(path)


def test_weights_outside_the_file(tmp_path):
    data = bytearray(bmodel_bytes([unet_demo()]))
    struct.pack_into("<Q", data, 12, 0)     # the header no longer counts the binary part
    path = tmp_path / "x.bmodel"
    path.write_bytes(data[:-10])
    assert "weights end 10 bytes after" in refusal(path)


@pytest.mark.parametrize("text", [b"\xff\xfe\xfa", b"a\nb", b"\x1b[2"])
def test_names_that_are_not_text(tmp_path, text):
    data = bmodel_bytes([network("qqqqq", {"x": (1,)}, {"y": (1,)})])
    path = tmp_path / "x.bmodel"
    path.write_bytes(data.replace(b"qqqqq", text.rjust(5, b"z")))
    assert "not readable text" in refusal(path)


@pytest.mark.parametrize("shape", [(0, 4), (2**31, 4), (2**63, 4), (1,) * 9])
def test_impossible_shapes(tmp_path, shape):
    refusal(write_bmodel(tmp_path / "x.bmodel", [network("n", {"x": shape}, {"y": (1,)})]))


def test_an_unknown_data_type(tmp_path, monkeypatch):
    path = write_bmodel(tmp_path / "x.bmodel", [network("n", {"x": (1,)}, {"y": (1,)}, {"x": "bfloat16"})])
    monkeypatch.setattr(bmodel, "DTYPES", bmodel.DTYPES[:8])
    assert "data type number 8" in refusal(path)


def test_no_network_no_stage_and_stages_that_disagree(tmp_path):
    assert "no network" in refusal(write_bmodel(tmp_path / "a.bmodel", []))
    assert "no compiled stage" in refusal(write_bmodel(tmp_path / "b.bmodel", [network("m", {}, {"y": (1,)})]))
    writer = Writer()
    stages = [writer.stage(net, 0, (0, 0), b"", 0) for net in (unet_demo(), text_encoder())]
    path = tmp_path / "c.bmodel"
    path.write_bytes(writer.file([writer.table({0: writer.text("n"), 3: writer.references(stages)})]))
    assert "stages that disagree" in refusal(path)


def test_networks_split_over_devices_are_refused(tmp_path):
    writer = Writer()
    cascade = writer.table({2: writer.text("whole")})
    stage = writer.stage(unet_demo(), 0, (0, 0), b"", 0)
    path = tmp_path / "x.bmodel"
    path.write_bytes(writer.file([writer.table({0: writer.text("part"), 3: writer.references([stage]), 4: cascade})]))
    assert "several devices" in refusal(path)


def test_many_references_to_one_record_end_soon(tmp_path):
    """A small file whose lists all point at the same records asks for endless work."""
    writer = Writer()
    tensors = writer.references([writer.tensor(unet_demo().inputs[0], 0)] * 3000)
    stages = writer.references([writer.table({0: tensors, 1: tensors})] * 3000)
    path = tmp_path / "x.bmodel"
    path.write_bytes(writer.file([writer.table({0: writer.text("n"), 3: stages})] * 3000))
    began = time.perf_counter()
    assert "more than 20,000 records" in refusal(path)
    assert time.perf_counter() - began < 2


def test_damage_anywhere_is_a_sentence_or_harmless(tmp_path):
    """Random truncation and overwriting: nothing but ModelFileError escapes."""
    rng = random.Random(1)
    whole = bmodel_bytes([WILD["many sizes"], WILD["text and pooled"]], weights=100)
    description = range(64, 64 + struct.unpack_from("<I", whole, 8)[0])
    path = tmp_path / "x.bmodel"
    refused = 0
    for turn in range(500):
        data = bytearray(whole)
        if turn % 5 == 0:
            del data[rng.randrange(len(data)):]
            if turn % 2 and len(data) > 64:     # a header that agrees with what is left
                struct.pack_into("<IQ", data, 8, len(data) - 64, 0)
        else:
            for _ in range(rng.choice((1, 1, 4, 30))):
                at = rng.choice(description) & ~3
                struct.pack_into("<I", data, at, rng.choice((0, 1, 4, 0x7FFFFFFF, 0xFFFFFFFF, rng.getrandbits(32),
                                                             rng.randrange(len(whole)))))
        path.write_bytes(data)
        try:
            read_bmodel(path)
        except ModelFileError as why:
            assert str(why).startswith("x.bmodel: ")
            refused += 1
    assert refused > 250
