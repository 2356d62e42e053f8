"""torch.amp's decorators of autograd functions, for CUDA."""

from functools import partial

import torch


def custom_amp_decorator(dec, cuda_amp_deprecated):
    """dec, with device_type="cuda" filled in where torch asks for it (cuda_amp_deprecated)."""
    return partial(dec, device_type="cuda") if cuda_amp_deprecated else dec


custom_fwd = custom_amp_decorator(torch.amp.custom_fwd, True)
custom_bwd = custom_amp_decorator(torch.amp.custom_bwd, True)
