"""Laws that calls obey whatever their values: the same bits under other circumstances."""

import dataclasses

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import compare, poison

# Arguments and results with an axis of rows, axis 0.
PER_ROW = {
    "causal_conv1d": {"x", "seq_idx", "initial_states", "out", "final_states"},
    "causal_conv1d_update": {
        "x",
        "conv_state",
        "cache_seqlens",
        "conv_state_indices",
        "out",
    },
    "selective_scan": {
        "u",
        "delta",
        "B",
        "C",
        "z",
        "initial_state",
        "seq_idx",
        "out",
        "last_state",
    },
    "selective_state_update": {
        "state",
        "x",
        "dt",
        "B",
        "C",
        "z",
        "state_batch_indices",
        "intermediate_states",
        "out",
    },
    "ssd_chunk_scan": {
        "x",
        "dt",
        "B",
        "C",
        "z",
        "initial_states",
        "seq_idx",
        "out",
        "final_states",
    },
    "mamba_inner": {"xz", "B", "C", "out"},
    "mamba2_inner": {"zxbcdt", "initial_states", "seq_idx", "out", "final_states"},
    "decode_linear": {"x", "z", "out"},
    "decode_linear_prenorm": {"x", "residual", "out", "residual_out"},
    "rms_norm_gated": {"x", "z", "out"},
    "layer_norm": {
        "x",
        "residual",
        "x1",
        "rowscale",
        "dropout_mask",
        "dropout_mask1",
        "out",
        "out1",
        "residual_out",
    },
}


def _per_row(op, name, tensor):
    return name in PER_ROW[op] and not (
        name in ("B", "C") and tensor.dim() == 2 and op != "selective_state_update"
    )


def check_thread_count(call):
    """The number of threads changes no bit."""
    threads = torch.get_num_threads()
    outcomes = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            call.arena.restore()
            outcomes.append(compare.run(call))
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        compare.check_same(call, outcomes[0], other, "depends on the number of threads")


def check_row_position(call):
    """The position of a row in the batch changes no bit of it. (No slots: row b is slot b.)"""

    def roll(name, tensor):
        if isinstance(tensor, torch.Tensor) and _per_row(call.op, name, tensor):
            return tensor.roll(1, 0)
        return tensor

    rolled = dataclasses.replace(
        call,
        arguments={name: roll(name, value) for name, value in call.arguments.items()},
        cotangents={name: g if g is None else g.roll(1, 0) for name, g in call.cotangents.items()},
    )
    first, second = compare.run(call), compare.run(rolled)
    for kind in ("results", "gradients"):
        for name, value in getattr(first, kind).items():
            if _per_row(call.op, name, value):
                assert poison.same_bits(value.roll(1, 0), getattr(second, kind)[name]), (
                    f"{call.op}: {kind} {name} depends on the position of the row\n  {call.note}"
                )


def check_gradient_subsets(call):
    """Each gradient alone is the same as among all the others."""
    everything = compare.run(call)
    for name in call.differentiable:
        one = compare.run(dataclasses.replace(call, differentiable=(name,)))
        assert poison.same_bits(one.gradients[name], everything.gradients[name]), (
            f"{call.op}: gradient of {name} depends on which others are wanted\n  {call.note}"
        )


def check_repeats(call, count=20):
    """Repetition changes no bit."""
    call.arena.restore()
    first = compare.run(call)
    for _ in range(count - 1):
        call.arena.restore()
        compare.check_same(call, first, compare.run(call), "differs from run to run")


def gradcheck(call, **options):
    """torch's comparison with finite differences, in float64; repeats must agree bit for bit."""
    names = call.differentiable
    leaves = [call.arguments[name].detach().clone().requires_grad_() for name in names]

    def function(*tensors):
        return tuple(call.invoke(**dict(zip(names, tensors))).values())

    assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0, **options)


class _Moves(TorchDispatchMode):
    """Names of the operations that do nothing but rearrange at least `least` elements."""

    MOVERS = ("copy_", "_to_copy", "clone", "contiguous", "cat", "stack", "repeat")

    def __init__(self, least):
        super().__init__()
        self.least = least
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in self.MOVERS and result.numel() >= self.least:
            self.found.append(f"{name} {tuple(result.shape)}")
        return result


def check_moves_nothing(run, least):
    """`run`, a forward and a backward, copies or concatenates no tensor of `least` elements."""
    with _Moves(least) as moves:
        run()
    assert not moves.found
