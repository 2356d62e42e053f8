"""Causal depthwise convolution, over the operations of mamba_ssm."""

__version__ = "1.7.0"

from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
