"""Selective state space models: fused CPU and CUDA operations and the modules built on them.

Importing the package registers ``torch.ops.mamba_ssm``. It needs torch and nothing else, does not
initialize CUDA and prints nothing.
"""

__version__ = "2.4.0"

from mamba_ssm import _library  # noqa: F401  first: it registers the ops that all else calls
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.modules.mamba2 import Mamba2
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops import _flops, _layouts  # noqa: F401  for torch's FLOP counter and compiler
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn

# Programs reach these as attributes after `import mamba_ssm`.
from mamba_ssm.ops.triton import layer_norm as _layer_norm  # noqa: F401
from mamba_ssm.ops.triton import layernorm as _layernorm  # noqa: F401
from mamba_ssm.ops.triton import layernorm_gated as _layernorm_gated  # noqa: F401
from mamba_ssm.ops.triton import selective_state_update as _selective_state_update  # noqa: F401
from mamba_ssm.ops.triton import ssd_combined as _ssd_combined  # noqa: F401
from mamba_ssm.utils import generation as _generation  # noqa: F401

__all__ = ["Mamba", "Mamba2", "MambaLMHeadModel", "mamba_inner_fn", "selective_scan_fn"]
