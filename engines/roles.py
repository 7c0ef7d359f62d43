"""Tell which stage a network is, and which of its ports carries what, from shapes and positions.

Compilers rename ports (`input.1`, `noise_pred_Conv_f32`), so names are asked only where shapes leave a choice.
A size of -1, free at run time, fits every rule.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .network import ModelFileError, Network, Port

LATENT_CHANNELS = 4
INPAINT_CHANNELS = 9            # latent, mask, masked picture
MOMENT_CHANNELS = (8, 4)        # mean and log variance, or the mean alone
VAE_SCALE = 8                   # picture pixels for each latent one, each way, in every SD family
TIME_IDS = (6, 5)               # sizes and crops of SDXL: base, refiner
SDXL_VECTORS = (2816, 2560)     # pooled text and embedded sizes in one: 1280 + 256 * TIME_IDS

ROLES = {"text_encoder": "text encoder", "unet": "U-Net", "controlnet": "ControlNet",
         "vae_decoder": "VAE decoder", "vae_encoder": "VAE encoder"}
FAMILIES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}


@dataclass(frozen=True)
class Binding:
    """A role, one of ROLES, and the port index of each of its arguments. Shapes, with B = batch:

    text_encoder  ids [B,T] -> hidden [B,T,D], pooled [B,D] (if it has it)
    unet          latent [B,4 or 9,h,w], timestep [B] or [1] or [], context [B,T,D];
                  if it takes ControlNets: residual.0, residual.1, ... and residual.mid [B,C,h',w'];
                  if it is an SDXL: y [B,V] and, unless y has them in it, time_ids [B,6] -> prediction [B,4,h,w]
    controlnet    as the unet, less residuals, and image [B,3,8h,8w] -> residual.0, ..., residual.mid
    vae_decoder   latent [B,4,h,w] -> image [B,3,8h,8w]
    vae_encoder   image [B,3,8h,8w] -> moments [B,8 or 4,h,w]
    """

    role: str
    inputs: dict[str, int]
    outputs: dict[str, int]


def identify(network: Network) -> Binding:
    """The role of a network, the same in each of its variants. Raises ModelFileError in one sentence if it has none."""
    found = [_match(network, variant) for variant in range(network.variants)]
    if not found or found[0] is None or any(binding != found[0] for binding in found):
        raise ModelFileError(
            f"Network {network.name!r} is no {', '.join(list(ROLES.values())[:-1])} or {list(ROLES.values())[-1]}: "
            f"it takes {_words(network.inputs)} and gives {_words(network.outputs)}.")
    return found[0]


def family(binding: Binding, network: Network) -> str | None:
    """"sd1", "sd2" or "sdxl" of a U-Net or ControlNet, by the width of its context; None for the stages all share."""
    if "context" not in binding.inputs:
        return None
    width = network.inputs[binding.inputs["context"]].shapes[0][2]
    if "y" in binding.inputs or width == 2048:
        return "sdxl"
    return "sd2" if width == 1024 else "sd1"


def _match(network: Network, variant: int) -> Binding | None:
    inputs, outputs = _Side(network.inputs, variant), _Side(network.outputs, variant)
    found = [binding for rule in (_text_encoder, _unet, _controlnet, _vae_decoder, _vae_encoder)
             if (binding := rule(inputs, outputs))]
    if len(found) > 1:      # a VAE whose channels and sizes are all free: the names must tell which way it goes
        decodes = "decoder" in network.name.lower() or any("latent" in name for name in inputs.names)
        encodes = "encoder" in network.name.lower() or any("latent" in name for name in outputs.names)
        said = {"vae_decoder": decodes and not encodes, "vae_encoder": encodes and not decodes}
        found = [binding for binding in found if said.get(binding.role)]
    return found[0] if len(found) == 1 else None


class _Side:
    """The inputs or the outputs of one variant, sorted by rank. Ports are named by their index."""

    def __init__(self, ports: Sequence[Port], variant: int):
        self.names = [port.name.lower() for port in ports]
        self.shapes = [port.shapes[variant] for port in ports]
        self.pictures, self.tokens, self.vectors = (
            [index for index, shape in enumerate(self.shapes) if len(shape) == rank] for rank in (4, 3, 2))
        self.scalars = [index for index, shape in enumerate(self.shapes) if len(shape) <= 1]

    def __len__(self) -> int:
        return len(self.shapes)


def _text_encoder(inputs: _Side, outputs: _Side) -> Binding | None:
    """The last hidden state, where an exporter gives the others too, is the one named so."""
    if len(inputs) != 1 or not inputs.vectors or not outputs.tokens:
        return None
    last = [index for index in outputs.tokens if "last_hidden_state" in outputs.names[index]]
    hidden = (outputs.tokens if len(outputs.tokens) == 1 else last)[:1]
    if not hidden or len(outputs.vectors) > 1 or len(outputs.tokens + outputs.vectors) != len(outputs):
        return None
    if not _same(inputs.shapes[0][1], outputs.shapes[hidden[0]][1]):
        return None
    return Binding("text_encoder", {"ids": 0}, {"hidden": hidden[0]} | dict(zip(("pooled",), outputs.vectors)))


def _unet(inputs: _Side, outputs: _Side) -> Binding | None:
    """The latent is the first picture; the residuals of a ControlNet, if it takes any, are the others."""
    arguments = _denoiser(inputs)
    if not arguments or len(outputs) != 1 or not outputs.pictures:
        return None
    latent, *residuals = inputs.pictures
    taken, given = inputs.shapes[latent], outputs.shapes[0]
    if not _same(taken[1], LATENT_CHANNELS, INPAINT_CHANNELS) or not _same(given[1], LATENT_CHANNELS):
        return None
    if not _same(taken[2], given[2]) or not _same(taken[3], given[3]):
        return None
    if residuals:
        named = _residuals(inputs, residuals, mid_first=True)
        if not named:
            return None
        arguments |= named
    return Binding("unet", {"latent": latent} | arguments, {"prediction": 0})


def _controlnet(inputs: _Side, outputs: _Side) -> Binding | None:
    arguments = _denoiser(inputs)
    if not arguments or len(inputs.pictures) != 2 or len(outputs.pictures) != len(outputs):
        return None
    latent, image = sorted(inputs.pictures, key=lambda index: inputs.shapes[index][1] == 3)
    named = _residuals(outputs, outputs.pictures, mid_first=False)
    if not named or not _is_picture_of(inputs.shapes[image], inputs.shapes[latent]):
        return None
    return Binding("controlnet", {"latent": latent, "image": image} | arguments, named)


def _vae_decoder(inputs: _Side, outputs: _Side) -> Binding | None:
    if not _is_one_picture(inputs, outputs) or not _is_picture_of(outputs.shapes[0], inputs.shapes[0]):
        return None
    return Binding("vae_decoder", {"latent": 0}, {"image": 0})


def _vae_encoder(inputs: _Side, outputs: _Side) -> Binding | None:
    if not _is_one_picture(inputs, outputs) or not _is_picture_of(inputs.shapes[0], outputs.shapes[0], MOMENT_CHANNELS):
        return None
    return Binding("vae_encoder", {"image": 0}, {"moments": 0})


def _denoiser(inputs: _Side) -> dict[str, int] | None:
    """The arguments of U-Net and ControlNet that are no pictures; None if they are not these."""
    vectors = inputs.vectors
    if len(inputs.tokens) != 1 or len(inputs.scalars) != 1 or not inputs.pictures or len(vectors) > 2:
        return None
    arguments = {"timestep": inputs.scalars[0], "context": inputs.tokens[0]}
    widths = [inputs.shapes[index][1] for index in vectors]
    if len(vectors) == 1:
        return arguments | {"y": vectors[0]} if _same(widths[0], *SDXL_VECTORS) else None
    if len(vectors) == 2:
        y, time_ids = reversed(vectors) if widths[0] in TIME_IDS and widths[1] not in TIME_IDS else vectors
        return arguments | {"y": y, "time_ids": time_ids} if _same(inputs.shapes[time_ids][1], *TIME_IDS) else None
    return arguments


def _residuals(side: _Side, ports: list[int], mid_first: bool) -> dict[str, int] | None:
    """residual.0, 1, ... in the order of the ports, and residual.mid, which has the shape of the deepest of them.

    So if first and last are alike the first is mid (Sophgo's U-Nets), and if the last two are alike the last is
    (ControlNets, diffusers). If both are true the names tell, and if they do not, `mid_first`.
    """
    if len(ports) < 2:
        return None
    shapes = [side.shapes[port] for port in ports]
    ends = [end for end, neighbour in ((0, -1), (-1, -2)) if shapes[end] == shapes[neighbour]]
    if not ends:
        return None
    if len(ends) == 2:
        ends = [end for end in ends if "mid" in side.names[ports[end]]] or [0 if mid_first else -1]
    mid = ports[ends[0]]
    downs = [port for port in ports if port != mid]
    return {f"residual.{number}": port for number, port in enumerate(downs)} | {"residual.mid": mid}


def _is_one_picture(inputs: _Side, outputs: _Side) -> bool:
    return len(inputs) == len(outputs) == len(inputs.pictures) == len(outputs.pictures) == 1


def _is_picture_of(picture: tuple, latent: tuple, channels: Sequence[int] = (LATENT_CHANNELS,)) -> bool:
    return (_same(picture[1], 3) and _same(latent[1], *channels)
            and all(_same(big, small * VAE_SCALE) or small < 0 for big, small in zip(picture[2:], latent[2:])))


def _same(size: int, *wanted: int) -> bool:
    """Whether a size is one of those wanted; a free one is, and so is any where a free one is wanted."""
    return size < 0 or size in wanted or any(other < 0 for other in wanted)


def _words(ports: Sequence[Port]) -> str:
    """At most four ports in words: enough to recognise a network by, short enough for an error."""
    said = [f"{port.name!r} ({'x'.join('?' if size < 0 else str(size) for size in port.shapes[0]) or 'one number'})"
            for port in ports[:4]]
    if len(ports) > 4:
        said.append(f"{len(ports) - 4} more")
    return " and ".join(filter(None, (", ".join(said[:-1]), said[-1]))) if said else "nothing"
