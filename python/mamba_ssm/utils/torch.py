"""torch.amp's decorators of autograd functions, for CUDA."""

from functools import partial

import torch


def custom_amp_decorator(decorator):
    """decorator with device_type="cuda", to be used with or without further arguments."""
    return partial(decorator, device_type="cuda")


custom_fwd = custom_amp_decorator(torch.amp.custom_fwd)
custom_bwd = custom_amp_decorator(torch.amp.custom_bwd)
