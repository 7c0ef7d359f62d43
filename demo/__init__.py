"""The demo's tiny Stable-Diffusion-1.x-shaped model: its data, its training, and how its bmodels are made."""
