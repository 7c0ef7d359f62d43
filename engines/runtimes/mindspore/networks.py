"""SDXL's networks in MindSpore: built empty, filled one parameter at a time, called with what the host sends.

The U-Net and the VAE are mindone's; the text encoders are CLIP written out here, which is shorter than reaching every
hidden state of mindone's through its outputs, and saves four seconds of imports. Parameters have diffusers' names.
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn, ops
from mindspore.nn.utils import no_init_parameters

from ...sdxl.checkpoint import Parameter
from .modules import mindone

DTYPES = {"float32": ms.float32, "float16": ms.float16, "bfloat16": ms.bfloat16}
FACTOR = 8                  # pixels a latent cell, each way


class Input(Protocol):
    """An array that was sent to this process."""

    array: np.ndarray

    def tensor(self, dtype: ms.Type) -> Tensor:
        """It on the device, made when first asked for and kept until the array changes."""


class Network:
    """One network of a loaded checkpoint: {port: Input} -> {port: float32 array}."""

    title = ""
    inputs: tuple[str, ...] = ()

    def __call__(self, feeds: Mapping[str, Input]) -> dict[str, np.ndarray]:
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise RuntimeError(f"The {self.title} needs '{missing[0]}' and was not given it.")
        return self.run(feeds)

    def run(self, feeds: Mapping[str, Input]) -> dict[str, np.ndarray]:
        raise NotImplementedError


def on_host(tensor: Tensor) -> np.ndarray:
    return tensor.astype(ms.float32).asnumpy()


# -- filling -------------------------------------------------------------------------------------------------------
def convert(values: np.ndarray, source: str, target: str, name: str = "") -> Tensor:
    """A parameter's array, as its file has it, as a tensor of `target` (a key of DTYPES).

    bfloat16 comes as the uint16 of its bits, which are the upper half of a float32's. Raises RuntimeError for a weight
    that float16 cannot hold.
    """
    if source == "bfloat16":
        wide = values.astype(np.uint32)
        wide <<= 16
        values = wide.view(np.float32)
    if target == "bfloat16":        # numpy has none: MindSpore rounds, to nearest as torch does
        return Tensor.from_numpy(values.astype(np.float32, copy=False)).astype(ms.bfloat16)
    with np.errstate(over="ignore"):
        narrow = values.astype(target, copy=False)
    if narrow.dtype.itemsize < values.dtype.itemsize and np.isinf(narrow).any():
        raise RuntimeError(f"'{name}' holds values that float16 cannot: load the model with precision float32 or bfloat16.")
    return Tensor.from_numpy(np.ascontiguousarray(narrow))


class Weights(dict):
    """The parameters of a network that is functions, {diffusers name: tensor}."""

    def __init__(self, parameters: Iterable[Parameter], precision: str):
        super().__init__((p.name, convert(p.read(), p.dtype, precision, p.name)) for p in parameters)

    def __missing__(self, name: str) -> Tensor:
        raise RuntimeError(f"The checkpoint has no '{name}'.")


def build(kind: type, config: Mapping[str, object]) -> nn.Cell:
    """A network of mindone's whose parameters have no memory yet. Keys that its constructor does not know are left out."""
    known = inspect.signature(kind.__init__).parameters
    with no_init_parameters():
        net = kind(**{key: value for key, value in config.items() if key in known})
    net.set_train(False)
    return net


def named_parameters(net: nn.Cell) -> dict[str, ms.Parameter]:
    """The parameters of a network of mindone's, whose names are diffusers' where all layers are `mint`'s, as here.

    MindSpore's own names are not: it makes them unique in ways of its own.
    """
    return {f"{path}.{own}": parameter for path, cell in net.cells_and_names() for own, parameter in cell._params.items()}


def fill(net: nn.Cell, parameters: Iterable[Parameter], precision: str) -> None:
    """Give every parameter of `net` its values, one at a time: what is being converted is all that exists twice.

    Raises RuntimeError if the checkpoint lacks one, has one too many, or one of another shape.
    """
    empty = named_parameters(net)
    filled = set()
    for given in parameters:
        parameter = empty.get(given.name)
        if parameter is None or tuple(parameter.shape) != tuple(given.shape):
            has = "no such parameter" if parameter is None else f"{list(parameter.shape)} for it"
            raise RuntimeError(f"The checkpoint has '{given.name}' of {list(given.shape)} and mindone's network has {has}.")
        parameter.requires_grad = False
        parameter.set_dtype(DTYPES[precision])
        parameter.set_data(convert(given.read(), given.dtype, precision, given.name))
        filled.add(id(parameter))
    for name, parameter in empty.items():
        if id(parameter) not in filled:
            raise RuntimeError(f"The checkpoint has no '{name}'.")


# -- text encoders -------------------------------------------------------------------------------------------------
ACTIVATIONS = {
    "quick_gelu": lambda x: x * mint.sigmoid(1.702 * x),
    "gelu": lambda x: mint.nn.functional.gelu(x),
}


class TextEncoder(Network):
    """CLIP's text model (openai/CLIP and OpenCLIP), with transformers' parameter names."""

    inputs = ("ids", "layer")

    def __init__(self, config: Mapping[str, object], parameters: Iterable[Parameter], precision: str, title: str):
        self.title, self.config, self.weights = title, config, Weights(parameters, precision)
        self.heads, self.eps = int(config["num_attention_heads"]), float(config.get("layer_norm_eps", 1e-5))
        self.activation = ACTIVATIONS.get(config["hidden_act"])
        if self.activation is None:
            raise RuntimeError(f"The {title} uses '{config['hidden_act']}', and CLIP's are gelu and quick_gelu.")

    def run(self, feeds: Mapping[str, Input]) -> dict[str, np.ndarray]:
        """ids (B, n) integers, layer (1,) -> hidden (B, n, width), pooled (B, its width or the projection's).

        layer: -1 the output of the last layer, -2 of the one before, ...; 0 the last one's with the final norm.
        """
        ids, layer = feeds["ids"].array, int(feeds["layer"].array.reshape(-1)[0])
        layers, rows, longest = (int(self.config[key]) for key in
                                 ("num_hidden_layers", "vocab_size", "max_position_embeddings"))
        if ids.ndim != 2 or not 0 < ids.shape[1] <= longest:
            raise RuntimeError(f"The {self.title} takes at most {longest} tokens a row, not {ids.shape}.")
        wrong = ids[(ids < 0) | (ids >= rows)]
        if wrong.size:
            raise RuntimeError(f"A token id of {wrong[0]} is outside the vocabulary of {rows} ids of the {self.title}.")
        if not -layers <= layer <= 0:
            raise RuntimeError(f"The {self.title} has {layers} layers and was asked for the one at {layer}.")
        states = self._embed(ids)
        mask, hidden = self._causal(ids.shape[1], states.dtype), None
        for i in range(layers):
            states = self._layer(f"text_model.encoder.layers.{i}", states, mask)
            if i == layers + layer:
                hidden = states
        last = self._norm("text_model.final_layer_norm", states)
        # transformers takes the highest id where the config says 2, a mistake of early configs
        end = self.config.get("eos_token_id", 2)
        ends = ids.argmax(1) if end == 2 else (ids == end).argmax(1)
        pooled = ops.stack([last[i, int(end)] for i, end in enumerate(ends)])
        if "text_projection.weight" in self.weights:
            pooled = mint.nn.functional.linear(pooled, self.weights["text_projection.weight"])
        return {"hidden": on_host(last if layer == 0 else hidden), "pooled": on_host(pooled)}

    def _embed(self, ids: np.ndarray) -> Tensor:
        tokens, positions = (self.weights[f"text_model.embeddings.{of}_embedding.weight"] for of in ("token", "position"))
        return mint.nn.functional.embedding(Tensor(ids.astype(np.int32)), tokens) + positions[:ids.shape[1]]

    @staticmethod
    def _causal(length: int, dtype: ms.Type) -> Tensor:
        """No token looks at a later one. Finite, so that half precision adds it without making NaN."""
        return Tensor(np.triu(np.full((length, length), -3e4, np.float32), 1)).astype(dtype)

    def _layer(self, at: str, states: Tensor, mask: Tensor) -> Tensor:
        normed = self._norm(f"{at}.layer_norm1", states)
        query, key, value = (self._split(self._linear(f"{at}.self_attn.{name}_proj", normed)) for name in "qkv")
        scores = ops.matmul(query * (1 / math.sqrt(query.shape[-1])), key.swapaxes(-1, -2)) + mask
        mixed = ops.matmul(ops.softmax(scores, -1), value).swapaxes(1, 2).reshape(states.shape)
        states = states + self._linear(f"{at}.self_attn.out_proj", mixed)
        inner = self.activation(self._linear(f"{at}.mlp.fc1", self._norm(f"{at}.layer_norm2", states)))
        return states + self._linear(f"{at}.mlp.fc2", inner)

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)

    def _linear(self, at: str, x: Tensor) -> Tensor:
        return mint.nn.functional.linear(x, self.weights[f"{at}.weight"], self.weights[f"{at}.bias"])

    def _norm(self, at: str, x: Tensor) -> Tensor:
        return mint.nn.functional.layer_norm(x, (x.shape[-1],), self.weights[f"{at}.weight"], self.weights[f"{at}.bias"],
                                             self.eps)


# -- U-Net ---------------------------------------------------------------------------------------------------------
class UNet(Network):
    """mindone's SDXL U-Net, which takes the pooled text and the six sizes as one vector, as ComfyUI makes it."""

    title = "U-Net"
    inputs = ("latent", "timestep", "context", "y")

    def __init__(self, config: Mapping[str, object], parameters: Iterable[Parameter], precision: str, computing: str):
        """precision: of the parameters; computing: of what goes in, and so of what passes between the layers."""
        class Fused(mindone().UNet2DConditionModel):
            def get_aug_embed(self, emb, encoder_hidden_states, added_cond_kwargs):
                return self.add_embedding(added_cond_kwargs["y"].to(emb.dtype))

        self.dtype, self.config = DTYPES[computing], config
        self.net = build(Fused, config)
        fill(self.net, parameters, precision)
        keep_precision(self.net, precision)

    def run(self, feeds: Mapping[str, Input]) -> dict[str, np.ndarray]:
        """latent (B, C, h, w), timestep (B,), context (B, n, D), y (B, V) -> prediction (B, C, h, w)."""
        latent, timestep, context, y = (feeds[name] for name in self.inputs)
        self.check(latent.array, timestep.array, context.array, y.array)
        return {"prediction": self.predict(latent.array, timestep.array, context.tensor(self.dtype), y.tensor(self.dtype))}

    def predict(self, latent: np.ndarray, timestep: np.ndarray, context: Tensor, y: Tensor) -> np.ndarray:
        """The same with what does not change between steps on the device already, in the dtype it computes in."""
        out = self.net(Tensor.from_numpy(np.ascontiguousarray(latent)).astype(self.dtype),
                       Tensor.from_numpy(np.ascontiguousarray(timestep, np.float32)),
                       encoder_hidden_states=context, added_cond_kwargs={"y": y}, return_dict=False)[0]
        return on_host(out)

    def check(self, latent: np.ndarray, timestep: np.ndarray, context: np.ndarray, y: np.ndarray) -> None:
        """Raise RuntimeError unless the shapes are what this U-Net takes: its layers would fail in words of their own."""
        channels, width, vector = (self.config[key] for key in ("in_channels", "cross_attention_dim",
                                                               "projection_class_embeddings_input_dim"))
        if latent.ndim != 4 or latent.shape[1] != channels or 0 in latent.shape:
            raise RuntimeError(f"The U-Net takes latents (rows, {channels}, height, width) and was given {latent.shape}.")
        for what, array, rank, wanted in (("conditioning", context, 3, width), ("vector", y, 2, vector)):
            if array.ndim != rank or array.shape[-1] != wanted or 0 in array.shape:
                raise RuntimeError(f"The {what} is {array.shape} and this U-Net takes {wanted} numbers a row: use the text "
                                   "encoders that belong to it.")
        if timestep.ndim != 1 or not len(timestep) == len(context) == len(y) == len(latent):
            raise RuntimeError(f"The latent has {len(latent)} rows, the timestep {timestep.size}, the conditioning "
                               f"{len(context)} and its vector {len(y)}: they must be as many.")


# -- VAE -----------------------------------------------------------------------------------------------------------
class VaeHalf(Network):
    title = result = ""

    def __init__(self, vae: nn.Cell, channels: int):
        self.vae, self.channels = vae, channels

    def run(self, feeds: Mapping[str, Input]) -> dict[str, np.ndarray]:
        """(B, channels, height, width) -> the same rank; see `compute`."""
        given = feeds[self.inputs[0]]
        shape = given.array.shape
        if len(shape) != 4 or shape[1] != self.channels or 0 in shape:
            raise RuntimeError(f"The {self.title} takes (rows, {self.channels}, height, width) and was given {shape}.")
        self.check_size(*shape[2:])
        return {self.result: self.compute(given.tensor(ms.float32))}

    def check_size(self, height: int, width: int) -> None:
        pass

    def compute(self, x: Tensor) -> np.ndarray:
        raise NotImplementedError


class VaeDecoder(VaeHalf):
    title, inputs, result = "VAE decoder", ("latent",), "image"

    def compute(self, x: Tensor) -> np.ndarray:
        """Latent (B, C, h, w), not scaled -> picture (B, 3, 8h, 8w), about -1 to 1."""
        return on_host(self.vae.decoder(x if self.vae.post_quant_conv is None else self.vae.post_quant_conv(x)))


class VaeEncoder(VaeHalf):
    title, inputs, result = "VAE encoder", ("image",), "latent"

    def check_size(self, height: int, width: int) -> None:
        if height % FACTOR or width % FACTOR:
            raise RuntimeError(f"The VAE encodes pictures with sides that are multiples of {FACTOR}, not {width}x{height}.")

    def compute(self, x: Tensor) -> np.ndarray:
        """Picture (B, 3, H, W), -1 to 1 -> latent (B, C, H/8, W/8), the mean, not scaled."""
        moments = self.vae.encoder(x)
        moments = on_host(moments if self.vae.quant_conv is None else self.vae.quant_conv(moments))
        return np.ascontiguousarray(moments[:, :moments.shape[1] // 2])


def vae_halves(config: Mapping[str, object], parameters: Iterable[Parameter]) -> tuple[VaeDecoder, VaeEncoder]:
    """Always in float32: SDXL's VAE overflows in float16."""
    vae = build(mindone().AutoencoderKL, config)
    fill(vae, parameters, "float32")
    keep_precision(vae, "float32")
    return VaeDecoder(vae, config["latent_channels"]), VaeEncoder(vae, config.get("in_channels", 3))


def keep_precision(net: nn.Cell, precision: str) -> None:
    """mindone's attention computes float32 as float16 on an NPU unless told not to."""
    if precision == "float32":
        net.set_flash_attention_force_cast_dtype(None)
