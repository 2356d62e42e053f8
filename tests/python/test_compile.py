"""torch.compile and torch.export of every operation."""

import dataclasses

import mamba_ssm
import pytest
import torch
from harness import cases, compare
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch._dynamo.testing import CompileCounterWithBackend

CASES = {
    "causal_conv1d": cases.Conv(),
    "causal_conv1d packed": cases.Conv(packing="padded", layout="transposed"),
    "causal_conv1d plain": cases.Conv(bias=False, silu=False, initial_states=False),
    "causal_conv1d_update": cases.ConvUpdate(num_slots=7),
    "causal_conv1d_update ring": cases.ConvUpdate(ring=True, seqlen=2, state_len=5),
    "causal_conv1d_varlen_states": cases.VarlenStates(),
    "selective_scan": cases.Scan(),
    "selective_scan packed": cases.Scan(packing="padded", B=3, C="constant"),
    "selective_scan complex": cases.Scan(complex_A=True),
    "selective_scan plain": cases.Scan(
        D=False, z=False, delta_bias=False, delta_softplus=False, initial_state=False
    ),
    "selective_state_update": cases.StateUpdate(num_slots=7),
    "selective_state_update heads": cases.StateUpdate(nheads=4, ngroups=2),
    "selective_state_update tokens": cases.StateUpdate(tokens=3, intermediate_states=True),
    "ssd_chunk_scan": cases.Ssd(),
    "ssd_chunk_scan packed": cases.Ssd(packing="padded", D="channel", projection=True),
    "ssd_chunk_scan cu_seqlens": cases.Ssd(batch=1, num_sequences=3, limits=True),
    "ssd_chunk_scan plain": cases.Ssd(
        D=None, z=False, dt_bias=False, dt_softplus=False, initial_states=False
    ),
    "mamba_inner": cases.Inner(),
    "mamba_inner rms": cases.Inner(rms=True, proj_bias=True, checkpoint_lvl=0),
    "mamba2_inner": cases.Inner2(),
    "mamba2_inner MLP": cases.Inner2(d_nonssm=3, norm=False, packing="padded"),
    "mamba2_inner cu_seqlens": cases.Inner2(batch=1, num_sequences=3, limits=True, D="channel"),
    "rms_norm_gated": cases.NormGated(groups=3),
    "rms_norm_gated plain": cases.NormGated(z=False, bias=False, whole_row=True),
    "decode_linear": cases.DecodeLinear(),
    "decode_linear_prenorm": cases.DecodeLinearPrenorm(),
    "decode_linear plain": cases.DecodeLinear(norm=False, bias=False),
    "layer_norm": cases.LayerNorm(),
    "layer_norm heads": cases.LayerNorm(x1=True, weight1=True, bias1=True),
    "layer_norm plain": cases.LayerNorm(residual=False, bias=False, is_rms_norm=True),
}
INDUCTOR = (
    "causal_conv1d",
    "causal_conv1d_update",
    "selective_scan",
    "selective_state_update",
    "ssd_chunk_scan",
    "mamba_inner",
    "mamba2_inner",
    "rms_norm_gated",
    "layer_norm",
    "decode_linear",
    "decode_linear_prenorm",
)


def _backends():
    rows = []
    for label, case in CASES.items():
        rows.append(pytest.param(case, "aot_eager", id=f"{label}-aot_eager"))
        if label in INDUCTOR:
            rows.append(pytest.param(case, "inductor", id=f"{label}-inductor"))
    return rows


def _run(function, call):
    """Results, updated states and gradients through `function` in the place of the op."""
    arguments = {
        name: value.detach().clone() if isinstance(value, torch.Tensor) else value
        for name, value in call.arguments.items()
    }
    for name in call.differentiable:
        arguments[name].requires_grad_()
    results = function(**arguments)
    results = list(results) if isinstance(results, tuple) else [results]
    results = [r for r in results if r is not None]
    gradients = []
    if call.differentiable:
        gradients = torch.autograd.grad(
            results,
            [arguments[name] for name in call.differentiable],
            [call.cotangents[name].clone() for name in call.results],
        )
    return [r.detach() for r in results], [arguments[n] for n in call.mutable], list(gradients)


@pytest.mark.parametrize("case, backend", _backends())
def test_compile(case, backend, device):
    torch._dynamo.reset()
    call = case.call(device)
    op = call.function()

    def program(**arguments):  # neighbours to fuse with, an op between
        first = next(iter(arguments))
        results = op(**arguments)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(r + 0 * arguments[first].sum().to(r.dtype) for r in results if r is not None)

    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend=backend)
    eager, traced = _run(program, call), _run(compiled, call)
    for a, b in zip(eager[0], traced[0], strict=True):
        assert b.stride() == a.stride() or a.numel() == 0
    for group, traced_group in zip(eager, traced):  # gradients have the layout that suits Inductor
        for a, b in zip(group, traced_group, strict=True):
            torch.testing.assert_close(b, a)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_few_recompiles(case, device):
    """Ten lengths (or batch sizes, where a call has one token), at most two graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    op = case.call(device).function()

    def program(**arguments):
        return op(**arguments)

    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend=counter)
    sizes = ("seqlen", "total_tokens", "batch", "leading", "rows")
    field = next(name for name in sizes if getattr(case, name, None) is not None)
    for size in (5, 7, 8, 16, 19, 32, 33, 40, 64, 71):
        changes = {field: (2, size) if field == "leading" else size}
        if field == "batch" and case.num_slots is not None:
            changes["num_slots"] = 80
        call = dataclasses.replace(case, **changes).call(device)
        for eager, traced in zip(_run(op, call), _run(compiled, call)):
            for a, b in zip(eager, traced, strict=True):
                torch.testing.assert_close(b, a)
    assert counter.frame_count <= 3  # one compilation and at most two more


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_export(case, device):
    call = case.call(device)
    op = call.function()
    tensors = {n: v for n, v in call.arguments.items() if isinstance(v, torch.Tensor)}
    others = {n: v for n, v in call.arguments.items() if n not in tensors}

    class Program(torch.nn.Module):
        def forward(self, **tensors):
            return op(**tensors, **others)

    expected = compare.run(dataclasses.replace(call, cotangents={}, differentiable=())).results
    call.arena.restore()
    clones = {n: v.clone() for n, v in tensors.items()}
    exported = torch.export.export(Program(), (), clones)
    assert any(node.target is op for node in exported.graph.nodes)
    clones = {n: v.clone() for n, v in tensors.items()}
    results = exported.module()(**clones)
    results = results if isinstance(results, tuple) else (results,)
    results = [r for r in results if r is not None]
    results = dict(zip(call.results, results)) | {n: clones[n] for n in call.mutable}
    for name, value in results.items():
        torch.testing.assert_close(value, expected[name])


def test_export_with_dynamic_length(device):
    arguments = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in cases.Scan(seqlen=20).call(device).arguments.items()
    }
    softplus = arguments.pop("delta_softplus")

    class Program(torch.nn.Module):
        def forward(self, tensors):
            return torch.ops.mamba_ssm.selective_scan(**tensors, delta_softplus=softplus)

    length = torch.export.Dim("length", min=2, max=4096)

    shapes = {
        name: {tensor.dim() - 1: length} if name in ("u", "delta", "z", "B", "C") else {}
        for name, tensor in arguments.items()
    }
    exported = torch.export.export(Program(), (arguments,), dynamic_shapes=(shapes,))
    call = cases.Scan(seqlen=45).call(device)
    tensors = {n: v for n, v in call.arguments.items() if isinstance(v, torch.Tensor)}
    out, last_state = exported.module()(tensors)
    expected = call.invoke()
    torch.testing.assert_close(out, expected["out"])
    torch.testing.assert_close(last_state, expected["last_state"])


def test_compiled_chunk_scan(device):
    """mamba_chunk_scan_combined with packed sequences: one graph for every length and number."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def program(a, limits):
        return mamba_chunk_scan_combined(
            **a,
            chunk_size=64,
            dt_limit=limits,
            return_final_states=True,
            return_varlen_states=True,
        )

    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend=counter)
    for seqlen, num_sequences in ((19, 7), (7, 9), (64, 8), (33, 12), (11, 10), (71, 30)):
        case = cases.Ssd(batch=1, seqlen=seqlen, num_sequences=num_sequences)
        a = case.call(device).arguments
        outcomes = []
        for call in (program, compiled):
            x = a["x"].detach().clone().requires_grad_()
            results = call(a | {"x": x}, (0.0, float("inf")))
            (dx,) = torch.autograd.grad(sum(r.square().sum() for r in results), x)
            outcomes.append([*(r.detach() for r in results), dx])
        for eager, traced in zip(*outcomes):
            torch.testing.assert_close(traced, eager)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "kind, options", [(mamba_ssm.Mamba, {}), (mamba_ssm.Mamba2, {"headdim": 4})]
)
def test_compiled_module(kind, options, device):
    """A module in training: one graph for every length, the gradients of eager mode."""
    torch._dynamo.reset()
    module = kind(d_model=16, d_state=4, device=device, **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for length in (5, 7, 8, 16, 19, 32, 33, 40, 64, 71):
        x = torch.randn(2, length, 16, device=device)
        outcomes = []
        for call in (module, compiled):
            module.zero_grad()
            y = call(x)
            y.square().sum().backward()
            outcomes.append([y.detach(), *(p.grad.clone() for p in module.parameters())])
        for eager, traced in zip(*outcomes):
            torch.testing.assert_close(traced, eager)
    assert counter.frame_count <= 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="looks at the kernels of a GPU")
def test_compiled_cuda_block_copies_nothing():
    """in_proj has 1064 rows: Inductor pads those of its results to a multiple of 64."""
    torch._dynamo.reset()
    options = dict(device="cuda", dtype=torch.bfloat16)
    module = mamba_ssm.Mamba2(256, d_state=16, **options)
    x = torch.randn(2, 64, 256, requires_grad=True, **options)
    leaves = [x, *module.parameters()]
    compiled = torch.compile(module)

    def train():
        out = compiled(x)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    train()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        train()
        torch.cuda.synchronize()
    generated = [event.key for event in profile.key_averages() if event.key.startswith("triton_")]
    assert not [name for name in generated if "causal_conv1d" in name or "norm" in name], generated
    assert len(generated) <= 4, generated  # A and its gradient
