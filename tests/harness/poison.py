"""Memory that betrays who reads it too early or writes outside its own tensor."""

import contextlib

import torch

RED_ZONE = 256  # elements before and behind every tensor

LAYOUTS = ("contiguous", "transposed", "sliced", "step2", "offset", "expanded", "scalar")
OVERLAPPING = ("expanded", "scalar")  # several indices, one address: never for a tensor written to


@contextlib.contextmanager
def poisoned_memory():
    """Inside, torch fills what it allocates uninitialized: NaN, or the largest integer."""
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def bits(tensor):
    """The tensor's bytes as integers, so that NaN equals NaN and -0 differs from 0."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point():
        return tensor
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def _canary(dtype):
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 0x5A5A5A5A  # as an id it equals no other, as an index it is far outside


def _geometry(shape, layout):
    """Strides of a tensor of that layout, elements its buffer needs, and its offset in there."""
    rank = len(shape)
    order = list(range(rank))
    room = list(shape)
    step = 1
    offset = 0
    if layout == "transposed" and rank >= 2:
        order[-1], order[-2] = order[-2], order[-1]
    elif layout == "sliced":
        room = [size + 3 for size in shape]
    elif layout == "step2":
        step = 2
    elif layout == "offset":
        offset = 1
    strides = [0] * rank
    size = step
    for axis in reversed(order):
        strides[axis] = size
        size *= max(room[axis], 1)
    if layout == "sliced":
        offset = sum(strides)
    if layout == "expanded" and rank:
        strides[0] = 0
    elif layout == "scalar":
        strides = [0] * rank
    return strides, size + offset, offset


class Arena:
    """Places tensors in buffers of their own, all of whose other elements are canaries."""

    def __init__(self, device):
        self.device = torch.device(device)
        self._placed = []  # (name, view, buffer, copy of the buffer)

    def place(self, name, values, layout="contiguous"):
        """A view with the values of `values` (overlapping layouts keep one of those that clash)."""
        strides, size, offset = _geometry(values.shape, layout)
        buffer = torch.full(
            (size + 2 * RED_ZONE,), _canary(values.dtype), dtype=values.dtype, device=self.device
        )
        view = buffer.as_strided(values.shape, strides, RED_ZONE + offset)
        if values.numel():
            if layout in OVERLAPPING:
                kept = [slice(0, 1) if stride == 0 else slice(None) for stride in strides]
                view[tuple(kept)].copy_(values[tuple(kept)])
            else:
                view.copy_(values)
        self._placed.append((name, view, buffer, buffer.clone()))
        return view

    def check(self, mutable=()):
        """Raises unless only the elements of the tensors named in `mutable` have changed."""
        for name, view, buffer, copy in self._placed:
            expected = copy
            if name in mutable:
                expected = copy.clone()
                expected.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(view)
            if not same_bits(buffer, expected):
                where = (bits(buffer) != bits(expected)).nonzero()[:, 0].tolist()
                raise AssertionError(
                    f"{name}: {len(where)} elements outside the tensor (or of an input) were "
                    f"written, the first {where[0] - view.storage_offset()} behind its start"
                )

    def restore(self):
        """Puts every buffer back as it was when placed."""
        for _, _, buffer, copy in self._placed:
            buffer.copy_(copy)
