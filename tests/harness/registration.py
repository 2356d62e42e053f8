"""Tests of what only libmamba_ssm.so has: the fused blocks and the C++ modules."""

import pytest
from mamba_ssm import _library

NATIVE = _library.NATIVE
fused_only = pytest.mark.skipif(not NATIVE, reason="the blocks are fused in libmamba_ssm.so alone")
bindings_only = pytest.mark.skipif(not NATIVE, reason="the C++ modules are in libmamba_ssm.so")


def import_bindings():
    """mamba_ssm._C; skips where there is none."""
    return pytest.importorskip("mamba_ssm._C", exc_type=ImportError)
