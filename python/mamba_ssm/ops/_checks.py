"""Shapes of arguments where no kernel checks them, with the messages of csrc/ops/checks.h."""


def sizes(op, name, tensor, *dims):
    """Sizes of `tensor`, which has as many dimensions as there are names in `dims`."""
    if tensor.dim() != len(dims):
        raise RuntimeError(f"{op}: {name} must have shape {_text(dims)}, got {_text(tensor.shape)}")
    return tensor.shape


def shape(op, name, tensor, **dims):
    """`tensor`, unless it is None, has the sizes `dims`."""
    if tensor is not None and tuple(tensor.shape) != tuple(dims.values()):
        raise RuntimeError(
            f"{op}: {name} must have shape {_text(dims)} = {_text(dims.values())}, "
            f"got {_text(tensor.shape)}"
        )


def devices(op, arguments):
    """All tensors are where the first one is."""
    tensors = {n: v for n, v in arguments.items() if hasattr(v, "device")}
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        if tensor.device != tensors[first].device:
            raise RuntimeError(
                f"{op}: {name} must be on the device of {first}, {tensors[first].device}, "
                f"got {tensor.device}"
            )


def _text(values):
    return f"({', '.join(map(str, values))})"
