"""Makes the SDXL demo's model, a folder as diffusers keeps one, out of the small files in demo/weights.

    python -m demo.sdxl.build --tokenizer path/to/ComfyUI/comfy/sd1_tokenizer

The token tables get all of CLIP's 49408 rows, text encoder 1 the last layer that SDXL leaves out, and everything stays
float16. The configs in folder/ are what diffusers wrote for the networks of nets.py. Needs numpy and safetensors, not
torch: ComfyUI's Python can run it as well as MindSpore's.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from ..vocabulary import TOKEN_TABLE, Vocabulary, Vocabulary2

DEMO = Path(__file__).resolve().parent.parent
WEIGHTS = DEMO / "weights"
CONFIGS = DEMO / "sdxl" / "folder"
OUT = DEMO / "models" / "diffusers" / "shapes-sdxl"

TEXT_MODEL = "text_model."  # how parameter names of both text encoders begin
FIRST_LAYER, LAST_LAYER = "encoder.layers.0.", "encoder.layers.2."
# part -> (its file in demo/weights, its file in the folder)
PARTS = {
    "text_encoder": ("text_encoder", "model"),
    "text_encoder_2": ("sdxl_text_encoder_2", "model"),
    "unet": ("sdxl_unet", "diffusion_pytorch_model"),
    "vae": ("vae", "diffusion_pytorch_model"),
}


def parameters(part: str, weights: Path = WEIGHTS) -> dict[str, np.ndarray]:
    """All parameters of one part, float16, by the names that diffusers and transformers give them."""
    arrays = load_file(weights / f"{PARTS[part][0]}.safetensors")
    if "seen_tokens" in arrays:
        vocabulary = {"text_encoder": Vocabulary, "text_encoder_2": Vocabulary2}[part](arrays.pop("seen_tokens").tolist())
        table = next(name for name in arrays if name.endswith(TOKEN_TABLE))
        arrays[table] = vocabulary.expand(arrays[table])
    if part == "text_encoder":
        # SDXL reads the state before the last layer, so one that adds nothing stands after the SD 1.x demo's two.
        first = [name for name in arrays if name.startswith(FIRST_LAYER)]
        arrays |= {name.replace(FIRST_LAYER, LAST_LAYER): np.zeros_like(arrays[name]) for name in first}
        arrays = {TEXT_MODEL + name: array for name, array in arrays.items()}
    return arrays


def build(out: Path = OUT, weights: Path = WEIGHTS, tokenizer: Path | None = None) -> None:
    """Writes the folder, in place of one that is there. Without `tokenizer` (CLIP's files) for ComfyUI alone."""
    beside = out.with_name(out.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(CONFIGS, beside)
    for part, (_, file) in PARTS.items():
        save_file(parameters(part, weights), beside / part / f"{file}.safetensors", {"format": "pt"})
    for name in ("vocab.json", "merges.txt") if tokenizer else ():
        for folder in ("tokenizer", "tokenizer_2"):
            shutil.copy(tokenizer / name, beside / folder / name)
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="folder with CLIP's vocab.json and merges.txt, for pipelines")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    build(args.out, args.weights, args.tokenizer)


if __name__ == "__main__":
    main()
