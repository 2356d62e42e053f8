"""Determinism switches, kept for programs that set them: results are always the same bits."""

import os

import torch

_mode = None


def set_deterministic_mode(value):
    """What use_deterministic_mode returns from now on; None: what the environment says. It changes
    nothing else."""
    global _mode
    _mode = value


def use_deterministic_mode():
    """The mode set, else environment variable MAMBA_DETERMINISTIC ("1..." is on), else torch's."""
    if _mode is not None:
        return _mode
    variable = os.environ.get("MAMBA_DETERMINISTIC")
    if variable:
        return variable.startswith("1")
    return torch.are_deterministic_algorithms_enabled()


def autotune_configs(configs):
    """configs themselves: nothing is tuned when it runs, and so nothing has to be pinned."""
    return configs


def alloc_tile_workspace(base_shape, tile_dim, dtype, device, deterministic, *, zero_init=True):
    """Where kernels of others add up parts: a tensor and the stride between the parts.

    With `deterministic` (*base_shape, tile_dim), one place for each part, zeros if zero_init; else
    base_shape, not initialized, and stride 0. (None, 0) for no base_shape.
    """
    if base_shape is None:
        return None, 0
    shape = (*base_shape, tile_dim) if deterministic else tuple(base_shape)
    make = torch.zeros if deterministic and zero_init else torch.empty
    workspace = make(shape, dtype=dtype, device=device)
    return workspace, workspace.stride(-1) if deterministic else 0


def finalize_tile_workspace(tensor, deterministic):
    """The sum of the parts of a tensor of alloc_tile_workspace; None for None."""
    return tensor.sum(-1) if deterministic and tensor is not None else tensor
