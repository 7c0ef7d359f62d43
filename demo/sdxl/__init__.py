"""The demo's SDXL in miniature: two text encoders and a U-Net of their own, the VAE of the SD 1.x demo."""
