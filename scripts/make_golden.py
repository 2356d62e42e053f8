"""Writes tests/golden/mamba.safetensors: a Mamba block, its output and its gradients.

The expected values come from the formula of the paper in plain PyTorch, float64, one time step
after the other; no operation of this library takes part. Tests of both languages read the file.

usage: python scripts/make_golden.py [OUTPUT]
"""

import math
import sys
from pathlib import Path

import torch

from mamba_ssm import Mamba, _C

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "tests" / "golden" / "mamba.safetensors"


def silu(x):
    return x / (1 + torch.exp(-x))


def mamba_formula(w, hidden_states):
    """The block (arXiv 2312.00752, section 3.4) with weights w; (batch, seqlen, d_model)."""
    dim, _, width = w["conv1d.weight"].shape
    dstate = w["A_log"].shape[1]
    dt_rank = w["dt_proj.weight"].shape[1]
    A = -torch.exp(w["A_log"])
    history = [hidden_states.new_zeros(len(hidden_states), dim)] * (width - 1)
    state = hidden_states.new_zeros(len(hidden_states), dim, dstate)
    outputs = []
    for token in hidden_states.unbind(1):  # (batch, d_model)
        x, z = (token @ w["in_proj.weight"].T).split(dim, dim=1)
        history.append(x)
        taps = history[-width:]
        x = silu(
            sum(w["conv1d.weight"][:, 0, k] * taps[k] for k in range(width)) + w["conv1d.bias"]
        )
        dt, B, C = (x @ w["x_proj.weight"].T).split([dt_rank, dstate, dstate], dim=1)
        delta = torch.log1p(torch.exp(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"]))
        decay = torch.exp(delta[:, :, None] * A)
        state = decay * state + (delta * x)[:, :, None] * B[:, None, :]
        y = (state * C[:, None, :]).sum(-1) + w["D"] * x
        outputs.append((y * silu(z)) @ w["out_proj.weight"].T)
    return torch.stack(outputs, dim=1)


def main(output):
    torch.manual_seed(0)
    block = Mamba(d_model=16, d_state=8)
    hidden_states = torch.randn(2, 9, 16)

    weights = {k: p.detach().double().requires_grad_() for k, p in block.named_parameters()}
    x = hidden_states.double().requires_grad_()
    out = mamba_formula(weights, x)
    dout = torch.tensor([math.cos(i) for i in range(out.numel())], dtype=torch.float64)
    out.backward(dout.view_as(out))

    tensors = {f"weight.{name}": w for name, w in weights.items()}
    tensors |= {f"grad.{name}": w.grad for name, w in weights.items()}
    tensors |= {"input": x, "output": out, "grad.input": x.grad}
    _C.save_safetensors(output, {name: t.detach().float() for name, t in tensors.items()})
    print(f"{output}: {len(tensors)} tensors")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_OUTPUT)
