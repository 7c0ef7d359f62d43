"""Records a run of the demo's checkpoint in torch, float32, as the reference that comes with the nodes.

    python -m demo.record [--out FILE]

It boots a real ComfyUI and queues a workflow, as a person would. Needs what `make demo` installs.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from tools.comfyui import Server

NAME = "shapes-float32"
OUT = Path(__file__).parent / "recordings" / f"{NAME}.npz"
PROMPT = "a red circle on a white background"


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


REFERENCE = {"torch": node("SophgoLoadReference", ckpt_name="shapes.safetensors")}
REFERENCE_PARTS = [["torch", 0], ["torch", 1], ["torch", 2]]


def workflow(name: str = NAME, steps: int = 8, loaders: dict = REFERENCE, parts: list = REFERENCE_PARTS) -> dict:
    """API format: the shipped text-to-image workflow, recorded as `name`; parts: where MODEL, CLIP and VAE come from."""
    model, clip, vae = parts
    return {
        **loaders,
        "record": node("SophgoRecord", name=name, limit_mb=64, model=model, clip=clip, vae=vae),
        "prompt": node("SophgoTextEncode", clip=["record", 2], prompt=PROMPT, negative_prompt=""),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sample": node(
            "KSampler",
            model=["record", 1],
            positive=["prompt", 0],
            negative=["prompt", 1],
            latent_image=["empty", 0],
            seed=1,
            steps=steps,
            cfg=3.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["record", 3]),
        "encode": node("VAEEncode", pixels=["decode", 0], vae=["record", 3]),
        "image": node("SaveImage", images=["decode", 0], filename_prefix=name),
        "latent": node("SaveLatent", samples=["encode", 0], filename_prefix=name),
    }


def record(prompt: dict, name: str, out: Path, models: Path | None = None) -> None:
    """Run a workflow in a ComfyUI of its own and keep its recording as `out`; models: a folder for models/sophgo."""
    with tempfile.TemporaryDirectory() as base, Server(Path(base)) as server:
        if models is not None and models.exists():
            shutil.copytree(models, server.base / "models" / "sophgo", dirs_exist_ok=True)
        server.run(prompt, seconds=3600)
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(shutil.copy(server.base / "output" / "recordings" / f"{name}.npz", out.with_suffix(".part")))
        part.replace(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    record(workflow(), NAME, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
