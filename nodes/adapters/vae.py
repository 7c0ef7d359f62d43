"""VAE halves that run on a device as an ordinary VAE."""
from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.sd
import torch

from ...engines.errors import EngineError
from ...engines.roles import VAE_SCALE
from ...engines.stages import Stage, VAEDecoder, VAEEncoder
from .choices import DEFAULT_OVERLAP
from .host import tell
from .model import as_array
from .patcher import CPU, Together, patcher_for


class FirstStage(torch.nn.Module):
    """Stands where ComfyUI expects the first stage model; pixels in [-1,1], latents unscaled, float32."""

    def __init__(self, decoder: Stage | None, encoder: Stage | None):
        super().__init__()
        self.decoder, self.encoder = decoder, encoder
        self.stage = Together("VAE", [half for half in (decoder, encoder) if half is not None])

    def decode(self, z: torch.Tensor, *overlap: int) -> torch.Tensor:
        """overlap: picture pixels, for halves that need tiles."""
        if self.decoder is None:
            raise EngineError(f"{self.stage.names} has no VAE decoder: load one to decode latents.")
        return torch.from_numpy(self.decoder(as_array(z), *overlap))

    def encode(self, pixels: torch.Tensor, *overlap: int) -> torch.Tensor:
        if self.encoder is None:
            raise EngineError(f"{self.stage.names} has no VAE encoder: choose an encoder file in SophgoLoadVAE, or use a "
                              "stock VAE to encode.")
        return torch.from_numpy(self.encoder(as_array(pixels), *overlap))


@contextmanager
def without_warnings() -> Iterator[None]:
    """For a comfy.sd.VAE that is given its network later: ComfyUI would say that there is none."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


class EngineVAE(comfy.sd.VAE):
    """comfy.sd.VAE with a first stage that runs on a device of its own, for any size divisible by 8."""

    def __init__(self, decoder: Stage | None, encoder: Stage | None):
        with without_warnings():
            super().__init__(sd={})          # its defaults for SD's VAE: 8x, 4 channels, [-1,1]
        self.first_stage_model = FirstStage(decoder, encoder)
        self.device = self.output_device = CPU
        self.vae_dtype = torch.float32
        self.memory_used_encode = self.memory_used_decode = lambda shape, dtype: 1
        self.patcher = patcher_for(self.first_stage_model)

    def model_size(self):
        return self.patcher.model_size()

    def get_sd(self):
        stage = self.first_stage_model.stage
        raise EngineError(f"{stage.names} {stage.nature}: its weights cannot be saved; copy the file.")

    def encode(self, pixel_samples):
        height, width = pixel_samples.shape[1:3]
        kept = [side // VAE_SCALE * VAE_SCALE for side in (width, height)]
        if not all(kept):
            raise EngineError(f"A picture of {width}x{height} is smaller than one latent element of "
                              f"{VAE_SCALE}x{VAE_SCALE}.")
        if kept != [width, height]:
            tell(f"Picture of {width}x{height} cropped to {kept[0]}x{kept[1]}: sizes must be multiples of {VAE_SCALE}.")
        return super().encode(pixel_samples)


class TiledVAE(EngineVAE):
    """A compiled VAE: its tiles have the compiled size, whatever size a node asks for."""

    def decode_tiled_(self, samples, tile_x=None, tile_y=None, overlap=DEFAULT_OVERLAP // VAE_SCALE):
        """overlap: latent elements."""
        return self.process_output(self.first_stage_model.decode(samples, overlap * VAE_SCALE))

    def encode_tiled_(self, pixel_samples, tile_x=None, tile_y=None, overlap=DEFAULT_OVERLAP):
        """overlap: pixels."""
        return self.first_stage_model.encode(self.process_input(pixel_samples), overlap)


def as_vae(decoder: VAEDecoder | None, encoder: VAEEncoder | None) -> TiledVAE:
    """The VAE for a compiled decoder and/or encoder."""
    return TiledVAE(decoder, encoder)


def decode(vae, samples: torch.Tensor, overlap: int = DEFAULT_OVERLAP) -> torch.Tensor:
    """Latents (B,4,h,w) -> pictures (B,H,W,3) in [0,1] by any VAE; overlap in pixels is for a compiled one's tiles."""
    if isinstance(vae, TiledVAE):
        return vae.decode_tiled(samples, overlap=overlap // VAE_SCALE)
    pictures = vae.decode(samples)
    return pictures.reshape(-1, *pictures.shape[-3:])        # a video's VAE gives frames in a dimension of their own


def encode(vae, pixels: torch.Tensor, overlap: int = DEFAULT_OVERLAP) -> torch.Tensor:
    """Pictures (B,H,W,C) in [0,1] -> latents (B,4,h,w) by any VAE; overlap in pixels is for a compiled one's tiles."""
    pixels = pixels[..., :3]
    if isinstance(vae, TiledVAE):
        return vae.encode_tiled(pixels, overlap=overlap)
    return vae.encode(pixels)
