"""Import mindone's U-Net and VAE without the rest of mindone.

Its packages import every model it has, and those import scipy, peft and all of transformers: eight to twelve seconds
for two files that need none of it. `Bare` packages stand in for those packages: they find submodules and hand out empty
classes for the loader mixins. A mindone that is laid out differently is imported the plain way.
"""
from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
import warnings

BARE = ("mindone", "mindone.diffusers.loaders", "mindone.diffusers.loaders.single_file_model",
        *(f"mindone.diffusers.models.{kind}" for kind in ("unets", "autoencoders", "transformers")))
MODELS = "mindone.diffusers.models."
CLASSES = {"UNet2DConditionModel": "unets.unet_2d_condition", "AutoencoderKL": "autoencoders.autoencoder_kl",
           "Attention": "attention_processor", "BasicTransformerBlock": "attention", "GEGLU": "activations",
           "ResnetBlock2D": "resnet", "Transformer2DModel": "transformers.transformer_2d"}


class Bare(types.ModuleType):
    """A package that finds its submodules and has an empty class for any other name."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def mindone() -> types.SimpleNamespace:
    """The classes of CLASSES. Raises RuntimeError if mindone cannot be imported."""
    _hush()
    bare = [name for name in BARE if name not in sys.modules]
    try:
        for name in bare:
            spec = importlib.util.find_spec(name)
            sys.modules[name] = package = Bare(name)
            package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or ())
        return _classes()
    except Exception:       # of whatever kind, a plain import tells better what is wrong
        for name in [name for name in sys.modules if name.partition(".")[0] == "mindone"]:
            del sys.modules[name]
    try:
        return _classes()
    except Exception as error:
        raise RuntimeError(f"mindone cannot be imported in {sys.executable} ({type(error).__name__}: {error}): run "
                           "'python tools/install.py mindspore', or install mindone 0.5.0 there.") from error


def _classes() -> types.SimpleNamespace:
    return types.SimpleNamespace(**{name: getattr(importlib.import_module(MODELS + module), name)
                                    for name, module in CLASSES.items()})


def _hush() -> None:
    """No advice about frameworks that are not installed, and no questions to model hubs."""
    os.environ.update(TRANSFORMERS_VERBOSITY="error", TRANSFORMERS_NO_ADVISORY_WARNINGS="1", HF_HUB_OFFLINE="1")
    warnings.simplefilter("ignore")
