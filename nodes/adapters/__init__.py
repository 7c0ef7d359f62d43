"""The only place that knows ComfyUI's objects: turns engine stages into an ordinary MODEL, CLIP and VAE."""
