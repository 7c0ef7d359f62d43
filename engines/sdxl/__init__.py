"""SDXL without ComfyUI, torch or MindSpore: what a checkpoint holds, the noise schedules, the samplers, the loop.

    checkpoint     a file or folder -> its parts' configs, and their parameters one by one; says what it cannot use
      safetensorsfile, ckptfile, folder    the three forms it comes in: headers are read, parameters are not
      layout       where a parameter of diffusers' name is stored
      configs      configs of a file that has none, by the shapes of its tensors
      parts        every parameter that a config asks for, with its shape
      families     which other model a file is, to say so
      tensors      one tensor in a file
    schedules      noise levels
    samplers       from level to level
    loop           a whole run: conditions, guidance, masks, progress
    stages         text encoders, U-Net, VAE halves as the host calls them; the only one that the worker does not import

What is here is also sent to the worker as source and runs there: Python 3.9 or later, numpy, the standard library.
"""
AUTO = "auto"
PRECISIONS = (AUTO, "float32", "float16", "bfloat16")       # that text encoders and U-Net may compute in
