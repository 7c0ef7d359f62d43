"""Reading with memory, hashing, listing, and names from strangers."""
import hashlib
import os

import pytest

from engines import files
from engines.files import content_hash, find_models, list_models, read_model, resolve
from engines.network import ModelFileError
from tests.helpers.bmodel_writer import text_encoder, unet_demo, write_bmodel


@pytest.fixture
def root(tmp_path):
    """models/sophgo with one file, a folder of two, a pipeline one level deeper, and things that are no models."""
    root = tmp_path / "sophgo"
    for name in ("one.bmodel", "sd15/unet.bmodel", "sd15/text.BMODEL", "pipe/unet/model.onnx", "pipe/vae/model.onnx",
                 "notes/readme.txt", "sd15/readme.txt", ".hidden/x.bmodel", "sd15/._unet.bmodel"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (tmp_path / "secret.bmodel").write_bytes(b"x")
    return root


def test_read_model_is_remembered_until_the_file_changes(tmp_path):
    path = write_bmodel(tmp_path / "a.bmodel", [unet_demo()])
    first = read_model(path)
    assert read_model(str(path)) is first
    write_bmodel(path, [text_encoder()])
    os.utime(path, ns=(1, 1))
    assert read_model(path).networks[0].name == "text_encoder"


def test_read_model_goes_by_suffix(tmp_path):
    for name, words in {"a.txt": "only .bmodel and .onnx", "a.bmodel": "header", "a.ONNX": "ONNX model"}.items():
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ModelFileError, match=words):
            read_model(tmp_path / name)
    with pytest.raises(ModelFileError, match=r"none\.bmodel: there is no such file"):
        read_model(tmp_path / "none.bmodel")


def test_content_hash(tmp_path):
    path = tmp_path / "a.bmodel"
    path.write_bytes(b"abc" * 1_000_000)
    assert content_hash(path) == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


def test_content_hash_covers_weights_beside_an_onnx_file(tmp_path, monkeypatch):
    path, weights = tmp_path / "a.onnx", tmp_path / "a.data"
    path.write_bytes(b"graph")
    weights.write_bytes(b"weights")
    monkeypatch.setattr(files, "external_files", lambda _: (weights,))
    assert content_hash(path) == hashlib.sha256(b"graphweights").hexdigest()


def test_list_models(root, tmp_path):
    assert list_models([root, tmp_path / "absent"]) == [
        "one.bmodel", "pipe", "pipe/unet", "pipe/unet/model.onnx", "pipe/vae", "pipe/vae/model.onnx", "sd15",
        "sd15/text.BMODEL", "sd15/unet.bmodel"]


def test_find_models(root):
    assert [path.name for path in find_models(root / "sd15")] == ["text.BMODEL", "unet.bmodel"]
    assert find_models(root / "pipe") == [root / "pipe/unet/model.onnx", root / "pipe/vae/model.onnx"]
    assert find_models(root / "notes") == find_models(root / "absent") == []


def test_every_listed_name_resolves(root):
    for name in list_models([root]):
        path = resolve(name, [root])
        assert path == (root / name).resolve()
        assert path.is_file() or find_models(path)


def test_the_first_root_that_has_a_name_wins(root, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "one.bmodel").write_bytes(b"y")
    (other / "two.bmodel").write_bytes(b"y")
    assert resolve("one.bmodel", [root, other]) == root / "one.bmodel"
    assert resolve("two.bmodel", [root, other]) == other / "two.bmodel"


@pytest.mark.parametrize("name", [
    "", ".", "..", "/", "../secret.bmodel", "sd15/../../secret.bmodel", "sd15/../one.bmodel", "./one.bmodel",
    "sd15//unet.bmodel", "sd15/", "/etc/passwd", "C:/x.bmodel", "C:x.bmodel", "c:\\x.bmodel", "\\\\host\\x.bmodel",
    "..\\secret.bmodel", "sd15\\unet.bmodel", "one.bmodel:stream", "one.bmodel\0", "one.bmodel\n", ".hidden/x.bmodel",
    "one.bmodel ", " one.bmodel", "x.bmodel\x1b", "a" * 100_000, "a" * 300 + ".bmodel", "é" * 200, "\ud800",
    None, 3, ["one.bmodel"],
], ids=lambda name: repr(name)[:20])
def test_names_that_no_list_has_are_refused(root, name):
    with pytest.raises(ModelFileError) as caught:
        resolve(name, [root])
    message = str(caught.value)
    assert "is no name of a model" in message and "one.bmodel, pipe, " in message
    assert "\n" not in message and len(message) < 600 and "secret" not in message.split(";")[1]


@pytest.mark.parametrize("name", ["notes", "sd15/readme.txt", "one.bmode", "sd15/unet", "none.bmodel"])
def test_names_of_nothing_are_answered_with_the_nearest(root, name):
    if name == "notes":     # a folder, if an empty one: the loader says what is missing in it
        assert resolve(name, [root]) == root / "notes"
        return
    with pytest.raises(ModelFileError, match=f"There is no '{name}' in the model folders; there are "):
        resolve(name, [root])
    with pytest.raises(ModelFileError, match="there are one.bmodel, "):
        resolve("one.bmodle", [root])


def test_no_models_at_all(tmp_path):
    (tmp_path / "sophgo").mkdir()
    with pytest.raises(ModelFileError, match="there is no .bmodel or .onnx file in 'sophgo' yet"):
        resolve("a.bmodel", [tmp_path / "sophgo"])


def test_links_may_lead_to_other_model_folders_and_no_further(root, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.bmodel").write_bytes(b"x")
    (root / "file.bmodel").symlink_to(tmp_path / "secret.bmodel")
    (root / "folder").symlink_to(outside)
    (root / "shared").mkdir()
    (root / "shared/text.bmodel").symlink_to(root / "sd15/text.BMODEL")
    (root / "shared/bad.bmodel").symlink_to(tmp_path / "secret.bmodel")
    (root / "loop.bmodel").symlink_to(root / "loop.bmodel")
    names = list_models([root])
    assert not {"file.bmodel", "folder", "folder/x.bmodel", "shared/bad.bmodel", "loop.bmodel"} & set(names)
    assert "shared/text.bmodel" in names
    assert find_models(root / "shared", [root]) == [root / "shared/text.bmodel"]
    assert find_models(root / "shared") == []
    for name in ("file.bmodel", "folder/x.bmodel", "folder", "shared/bad.bmodel"):
        with pytest.raises(ModelFileError, match="a link that leads out"):
            resolve(name, [root])
    with pytest.raises(ModelFileError, match="There is no"):
        resolve("loop.bmodel", [root])
    assert resolve("folder/x.bmodel", [root, outside]) == outside / "x.bmodel"


def test_roots_may_be_links_themselves(root, tmp_path):
    (tmp_path / "models").symlink_to(root)
    assert list_models([tmp_path / "models"]) == list_models([root])
    assert resolve("one.bmodel", [tmp_path / "models"]) == root / "one.bmodel"
