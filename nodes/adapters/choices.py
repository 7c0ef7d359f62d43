"""What the nodes offer to choose from, apart from what carries it out: a node's schema needs no more than this."""
TRUNCATE, ERROR = "truncate", "error"        # what becomes of a prompt that is too long
ENCODE, ZEROS = "encode", "zeros"            # what SDXL is guided away from
COMFY, NUMPY = "comfy", "numpy"
NOISES = (COMFY, NUMPY)                      # whose random numbers
MAX_SEED = 0xFFFFFFFFFFFFFFFF
DEFAULT_OVERLAP = 64                         # picture pixels that neighbouring tiles share
