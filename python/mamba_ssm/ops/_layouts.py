"""Tells torch.compile that the operations take tensors of any strides.

Inductor may pad the rows of a product, and copies them for an operation that it knows nothing of: in
a Mamba-2 block of d_model 768 that took a tenth of the time (H200, 2026-11-26). The operations are
defined with torch's stable ABI, which has no tags before torch 2.12.
"""

import torch

from mamba_ssm.ops._flops import FORMULAS

for _name in FORMULAS:
    _tags = getattr(torch.ops.mamba_ssm, _name).default.tags
    if torch.Tag.flexible_layout not in _tags:
        _tags.append(torch.Tag.flexible_layout)
