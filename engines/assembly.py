"""From model files to stages: which networks a file or folder holds, and which device runs them."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .devices import Devices
from .engine import Engine
from .files import picked_files, read_model
from .network import ModelFile, ModelFileError, Network
from .roles import ROLES, identify
from .stages import Poll, TextEncoder, UNet, VAEDecoder, VAEEncoder


@dataclass(frozen=True)
class Source:
    """A file, or a folder of files, that someone picked by `name`."""

    name: str
    networks: tuple[tuple[ModelFile, Network, str], ...]    # with the role, "" where it is not recognised

    @classmethod
    def open(cls, name: str, path: Path, roots: list[Path]) -> Source:
        """Read what there is. Raises ModelFileError for a file that is broken; opens no device."""
        return cls(name, tuple((file, network, _role(network)) for file in map(read_model, picked_files(path, roots))
                               for network in file.networks))

    def engines(self, role: str, devices: Devices, device: str, required: bool = True) -> list[Engine]:
        """Engines for every network of `role` of the one format and chip that `device` runs (`auto`: runs best).

        Raises ModelFileError if there is none (an empty list where not `required`), DeviceError if no device fits.
        """
        kinds: dict[tuple, list] = {}
        for file, network, found in self.networks:
            if found == role:
                kinds.setdefault((file.format, file.chip), []).append((file, network))
        if not kinds:
            if not required:
                return []
            held = sorted({ROLES.get(found, "an unknown network") for *_, found in self.networks})
            raise ModelFileError(f"'{self.name}' holds no {ROLES[role]}, only: {', '.join(held) or 'nothing'}; pick "
                                 f"another file, or add one to its folder.")
        for file in {id(file): file for members in kinds.values() for file, _ in members}.values():
            _refuse_half_on_bm1684(file)
        chosen, spec = devices.choose(device, [members[0][0] for members in kinds.values()])
        return [Engine(file, network, spec) for file, network in kinds[chosen.format, chosen.chip]]

    def text_encoder(self, devices: Devices, device: str, poll: Poll) -> TextEncoder:
        return TextEncoder(self.engines("text_encoder", devices, device)[0], poll)

    def unet(self, devices: Devices, device: str, poll: Poll) -> UNet:
        return UNet(self.engines("unet", devices, device), poll)

    def vae_decoder(self, devices: Devices, device: str, poll: Poll, latent_scale_inside: bool = False) -> VAEDecoder:
        return VAEDecoder(self.engines("vae_decoder", devices, device), latent_scale_inside, poll)

    def vae_encoder(self, devices: Devices, device: str, poll: Poll, latent_scale_inside: bool = False,
                    required: bool = False) -> VAEEncoder | None:
        found = self.engines("vae_encoder", devices, device, required)
        return VAEEncoder(found, latent_scale_inside, poll) if found else None


def _refuse_half_on_bm1684(file: ModelFile) -> None:
    """The BM1684 computes in INT8 and FP32, nothing between (its data sheet)."""
    halves = {port.dtype for network in file.networks for port in (*network.inputs, *network.outputs)}
    if file.chip == "BM1684" and halves & {"float16", "bfloat16"}:
        raise ModelFileError(f"'{file.path.name}' has 16-bit floats and the BM1684 computes in F32 only: compile it as "
                             "F32, or for BM1684X.")


def _role(network: Network) -> str:
    try:
        return identify(network).role
    except ModelFileError:
        return ""
