"""From files to stages: what a folder holds decides, and what it lacks is said."""
import pytest

from engines.assembly import Source
from engines.devices import Devices
from engines.errors import DeviceError
from engines.network import ModelFileError
from tests.helpers.bmodel_writer import network, text_encoder, unet_demo, vae_decoder, write_bmodel

NOTHING = Devices([])


def half_precision(name: str):
    return network(name, {"latent": (1, 4, 64, 64)}, {"image": (1, 3, 512, 512)}, dtypes={"latent": "float16"})


def open_folder(folder, name="model"):
    return Source.open(name, folder, [folder])


def test_files_are_told_apart_by_what_they_hold(tmp_path):
    write_bmodel(tmp_path / "a.bmodel", [vae_decoder()])
    write_bmodel(tmp_path / "b.bmodel", [text_encoder(), unet_demo()])
    roles = {(file.path.name, role) for file, _, role in open_folder(tmp_path).networks}
    assert roles == {("a.bmodel", "vae_decoder"), ("b.bmodel", "text_encoder"), ("b.bmodel", "unet")}


def test_a_missing_stage_names_what_is_there(tmp_path):
    write_bmodel(tmp_path / "b.bmodel", [text_encoder(), vae_decoder()])
    with pytest.raises(ModelFileError, match="'model' holds no U-Net, only: VAE decoder, text encoder"):
        open_folder(tmp_path).engines("unet", NOTHING, "auto")
    assert open_folder(tmp_path).engines("vae_encoder", NOTHING, "auto", required=False) == []


def test_half_precision_on_the_bm1684_is_refused_before_a_device_is_asked(tmp_path):
    write_bmodel(tmp_path / "v.bmodel", [half_precision("vae")], chip="BM1684")
    with pytest.raises(ModelFileError, match="'v.bmodel' has 16-bit floats and the BM1684 computes in F32 only"):
        open_folder(tmp_path).engines("vae_decoder", NOTHING, "auto")
    write_bmodel(tmp_path / "v.bmodel", [half_precision("vae")], chip="BM1684X")
    with pytest.raises(DeviceError, match="No device"):
        open_folder(tmp_path).engines("vae_decoder", NOTHING, "auto")
