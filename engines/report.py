"""What a model file says of itself, as the text that the inspect node shows; nothing that it does not say."""
from __future__ import annotations

from collections.abc import Iterator

from .network import ModelFile, ModelFileError, Network, Port
from .roles import FAMILIES, INPAINT_CHANNELS, ROLES, VAE_SCALE, Binding, family, identify


def describe(model_file: ModelFile) -> str:
    """The report: the file, then each network with its role, ports in every compiled shape, picture sizes, remarks."""
    facts = {
        "chip": model_file.chip or "any (ONNX)",
        "file": _megabytes(model_file.file_bytes),
        "device memory": _device_memory(model_file),
        "compiler": model_file.compiler or "not stated",
        "created": model_file.created or "not stated",
    }
    blocks = [[model_file.path.name, *(f"  {name:<13}  {value}" for name, value in facts.items())]]
    blocks += [_network(network) for network in model_file.networks]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)


def brief(model_file: ModelFile) -> str:
    """A line for a node, whose letters are not of one width: what is in the file, for which chip, how much memory."""
    networks = [", ".join([_role(network), *(size.partition(" (")[0] for size in _sizes(network))])
                for network in model_file.networks]
    memory = f", {_megabytes(model_file.device_bytes)} on the device" if model_file.device_bytes else ""
    return f"{model_file.path.name}: {'; '.join(networks)}; {model_file.chip or 'ONNX'}{memory}"


def _role(network: Network) -> str:
    try:
        return ROLES[identify(network).role]
    except ModelFileError:
        return "role not recognised"


def _sizes(network: Network) -> Iterator[str]:
    try:
        yield from _picture_sizes(identify(network), network)
    except ModelFileError:
        pass


def _device_memory(model_file: ModelFile) -> str:
    if not model_file.device_bytes:
        return "not stated"
    commands = sum(memory.commands for network in model_file.networks for memory in network.memory)
    more = [f"{what} {_megabytes(size)}" for what, size in (("instructions", commands), ("kernels", model_file.kernel_bytes))
            if size]
    return (f"about {_megabytes(model_file.device_bytes)} (weights, scratch area, inputs and outputs)"
            + f", and {', '.join(more)}" * bool(more))


def _network(network: Network) -> list[str]:
    try:
        binding = identify(network)
        title = ROLES[binding.role]
        remarks = [*_picture_sizes(binding, network), *_remarks(binding, network)]
    except ModelFileError:
        binding = Binding("", {}, {})
        title = "role not recognised"
        remarks = [f"none of: {', '.join(ROLES.values())}"]
    if known := FAMILIES.get(family(binding, network)):
        title += f", {known}"
    if network.variants > 1:
        title += f", {network.variants} variants"
    return [f"{network.name or 'network'}: {title}",
            *_table([*_rows("input", network.inputs, binding.inputs),
                     *_rows("output", network.outputs, binding.outputs)]),
            *(f"  - {remark}" for remark in (*remarks, *_memory(network)))]


def _rows(side: str, ports: tuple[Port, ...], arguments: dict[str, int]) -> Iterator[tuple[str, ...]]:
    roles = {index: role for role, index in arguments.items()}
    for index, port in enumerate(ports):
        yield side, roles.get(index, ""), port.name, port.dtype, " or ".join(dict.fromkeys(map(_shape, port.shapes)))


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]


def _picture_sizes(binding: Binding, network: Network) -> Iterator[str]:
    """One line a size, width first, as users know it; a text encoder has none."""
    if "latent" in binding.inputs:
        port, pixels = network.inputs[binding.inputs["latent"]], VAE_SCALE
    elif "image" in binding.inputs:
        port, pixels = network.inputs[binding.inputs["image"]], 1
    else:
        return
    for shape in dict.fromkeys(shape[2:] for shape in port.shapes):
        if min(shape) < 0:
            yield "picture of any size"
        else:
            height, width = (side * pixels for side in shape)
            yield f"picture {width}x{height} (latent {width // VAE_SCALE}x{height // VAE_SCALE})"


def _memory(network: Network) -> Iterator[str]:
    """One line a variant; and whether the runtime can run all of them (docs/compile.md, known faults)."""
    for variant, memory in enumerate(network.memory, 1):
        which = f" of variant {variant}" if network.variants > 1 else ""
        sizes = {"weights": memory.weights, "scratch area": memory.scratch, "inputs and outputs": memory.io,
                 "instructions": memory.commands}
        yield f"memory{which}: " + ", ".join(f"{what} {_megabytes(size)}" for what, size in sizes.items() if size)
    scratch = [memory.scratch for memory in network.memory]
    if any(later > max(scratch[:i]) for i, later in enumerate(scratch) if i):
        yield ("the scratch area grows from one variant to a later one, and the runtime of TPU-MLIR 1.30 then computes the "
               "earlier ones wrongly: combine them again, the largest first")


def _remarks(binding: Binding, network: Network) -> Iterator[str]:
    inputs = {role: network.inputs[index] for role, index in binding.inputs.items()}
    half = {port.dtype for port in (*network.inputs, *network.outputs)} & {"float16", "bfloat16"}
    if half:
        yield f"{' and '.join(sorted(half))} inputs or outputs: values are converted on the way"
    if binding.role in ("unet", "controlnet"):
        batches = {shape[0] for shape in inputs["latent"].shapes}
        if batches == {2}:
            yield "batch 2: condition and uncondition in one call"
        elif batches == {1}:
            yield "batch 1: condition and uncondition in two calls"
        if inputs["latent"].shapes[0][1] == INPAINT_CHANNELS:
            yield f"{INPAINT_CHANNELS} latent channels: inpainting, with mask and masked picture"
        if inputs["timestep"].dtype.startswith(("int", "uint")):
            yield f"{inputs['timestep'].dtype} timestep: whole timesteps only"
    if "residual.mid" in inputs:
        yield f"ControlNet-capable: takes {sum(role.startswith('residual.') for role in inputs)} residuals"
    if "pooled" in binding.outputs:
        yield "also gives the pooled text"
    if binding.role == "vae_encoder" and network.outputs[0].shapes[0][1] == 4:
        yield "gives 4 channels: the mean without its variance"
    if network.dynamic:
        yield "dynamic: sizes are free at run time" + (", up to those above" if not _has_free_size(network) else "")


def _has_free_size(network: Network) -> bool:
    return any(size < 0 for port in network.inputs for shape in port.shapes for size in shape)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join("?" if size < 0 else str(size) for size in shape) or "one number"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 50_000 else f"{size / 1e3:,.1f} KB"
