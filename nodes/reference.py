"""The reference: a checkpoint in stock torch, which compiled networks are compared with."""
from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from . import library
from .base import CATEGORY, PackNode


class SophgoLoadReference(PackNode):
    ALIASES = ("load checkpoint", "torch", "float32", "reference", "ground truth", "parity", "precision", "参考", "精度")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SophgoLoadReference", display_name="Load Reference Checkpoint (Sophgo)",
            category=f"{CATEGORY}/alignment",
            description="Loads an SD 1.x checkpoint as stock torch MODEL, CLIP and VAE in float32: what compiled networks "
                        "are compared with, and compiled from. It takes small models too, such as the demo's.",
            inputs=[io.Combo.Input("ckpt_name", options=list(library.checkpoints()),
                                   tooltip="A .safetensors file under models/checkpoints with text encoder, U-Net, VAE.")],
            outputs=[io.Model.Output("MODEL", tooltip="The U-Net in torch; LoRAs and all other nodes work on it."),
                     io.Clip.Output("CLIP", tooltip="The text encoder in torch."),
                     io.Vae.Output("VAE", tooltip="The VAE in torch.")],
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name):
        return library.file_fingerprint(ckpt_name, library.checkpoint)

    @classmethod
    def execute(cls, ckpt_name) -> io.NodeOutput:
        from .adapters.reference import load_reference
        return io.NodeOutput(*load_reference(library.checkpoint(ckpt_name), folder_paths.get_folder_paths("embeddings")))
