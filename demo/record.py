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


def workflow(name: str = NAME, steps: int = 8) -> dict:
    """API format: the shipped text-to-image workflow in torch, recorded."""
    return {
        "1": {"class_type": "SophgoLoadReference", "inputs": {"ckpt_name": "shapes.safetensors"}},
        "2": {
            "class_type": "SophgoRecord",
            "inputs": {"name": name, "limit_mb": 16, "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]},
        },
        "3": {
            "class_type": "SophgoTextEncode",
            "inputs": {"clip": ["2", 2], "prompt": "a red circle on a white background", "negative_prompt": ""},
        },
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["2", 1],
                "positive": ["3", 0],
                "negative": ["3", 1],
                "latent_image": ["4", 0],
                "seed": 1,
                "steps": steps,
                "cfg": 3.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["2", 3]}},
        "7": {"class_type": "VAEEncode", "inputs": {"pixels": ["6", 0], "vae": ["2", 3]}},
        "8": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "recorded"}},
        "9": {"class_type": "SaveLatent", "inputs": {"samples": ["7", 0], "filename_prefix": "recorded"}},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as base, Server(Path(base)) as server:
        server.run(workflow())
        shutil.copy(server.base / "output" / "recordings" / f"{NAME}.npz", args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
