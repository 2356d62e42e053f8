"""Writes tests/golden/mamba.safetensors and mamba2.safetensors: a block, its output and gradients.

The expected values come from the formulas of the papers in plain PyTorch, float64, one time step
after the other; no operation of this library takes part. Tests of both languages read the file.

usage: python scripts/make_golden.py [FOLDER]
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch

from mamba_ssm import Mamba, Mamba2, _C

DEFAULT_FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden"


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


def mamba2_formula(w, hidden_states, d_ssm, headdim, ngroups):
    """The Mamba-2 block (arXiv 2405.21060, section 7) with weights w; (batch, seqlen, d_model)."""
    channels, _, width = w["conv1d.weight"].shape
    nheads = w["A_log"].shape[0]
    rows = (channels - d_ssm) // 2
    d_mlp = w["out_proj.weight"].shape[1] - d_ssm
    batch = len(hidden_states)
    A = -torch.exp(w["A_log"])
    history = [hidden_states.new_zeros(batch, channels)] * (width - 1)
    state = hidden_states.new_zeros(batch, nheads, headdim, rows // ngroups)
    outputs = []
    for token in hidden_states.unbind(1):  # (batch, d_model)
        parts = [d_mlp, d_mlp, d_ssm, channels, nheads]
        z0, x0, z, xBC, dt = (token @ w["in_proj.weight"].T).split(parts, dim=1)
        history.append(xBC)
        taps = history[-width:]
        xBC = silu(
            sum(w["conv1d.weight"][:, 0, k] * taps[k] for k in range(width)) + w["conv1d.bias"]
        )
        x, B, C = xBC.split([d_ssm, rows, rows], dim=1)
        x = x.view(batch, nheads, headdim, 1)
        B, C = (M.view(batch, ngroups, 1, -1) for M in (B, C))
        B, C = (M.repeat_interleave(nheads // ngroups, dim=1) for M in (B, C))
        delta = torch.log1p(torch.exp(dt + w["dt_bias"]))[:, :, None, None]
        state = torch.exp(delta * A[:, None, None]) * state + delta * x * B
        y = (state * C).sum(-1) + w["D"][:, None] * x[..., 0]
        gated = (y.flatten(1) * silu(z)).view(batch, ngroups, -1)
        normed = gated / torch.sqrt((gated * gated).mean(-1, keepdim=True) + 1e-5)
        y = normed.flatten(1) * w["norm.weight"]
        outputs.append(torch.cat([silu(z0) * x0, y], dim=1) @ w["out_proj.weight"].T)
    return torch.stack(outputs, dim=1)


def write(output, block, formula):
    """Weights of the block, an input, and the output and gradients of the formula."""
    hidden_states = torch.randn(2, 9, 16)
    weights = {k: p.detach().double().requires_grad_() for k, p in block.named_parameters()}
    x = hidden_states.double().requires_grad_()
    out = formula(weights, x)
    dout = torch.tensor([math.cos(i) for i in range(out.numel())], dtype=torch.float64)
    out.backward(dout.view_as(out))

    tensors = {f"weight.{name}": w for name, w in weights.items()}
    tensors |= {f"grad.{name}": w.grad for name, w in weights.items()}
    tensors |= {"input": x, "output": out, "grad.input": x.grad}
    _C.save_safetensors(output, {name: t.detach().float() for name, t in tensors.items()})
    print(f"{output}: {len(tensors)} tensors")


def main(folder):
    torch.manual_seed(0)
    write(folder / "mamba.safetensors", Mamba(d_model=16, d_state=8), mamba_formula)
    torch.manual_seed(0)
    sizes = {"d_ssm": 24, "headdim": 4, "ngroups": 2}  # of 32 channels, 8 in the gated MLP
    block = Mamba2(d_model=16, d_state=8, **sizes)
    with torch.no_grad():
        block.norm.weight.uniform_(0.5, 1.5)
        block.D.uniform_(0.5, 1.5)
    write(folder / "mamba2.safetensors", block, partial(mamba2_formula, **sizes))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER)
