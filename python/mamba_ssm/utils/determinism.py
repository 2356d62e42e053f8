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
