"""decode_linear and decode_linear_prenorm, and step_linear, which chooses between them and others."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from harness import cases, compare, poison, properties
from harness.registration import fused_only
from mamba_ssm import Mamba, Mamba2
from mamba_ssm.modules._parts import is_unhooked
from mamba_ssm.modules.block import Block
from mamba_ssm.ops.triton.layer_norm import RMSNorm
from mamba_ssm.utils.generation import InferenceParams

ops = torch.ops.mamba_ssm
SIZES = {
    "rows": [0, 1, 2, 4, 5, 9],
    "in_features": [0, 1, 8, 17, 48, 64, 130, 520, 1536],
    "out_features": [1, 3, 64, 65, 200],
    "bias": [False],
    "layout": poison.LAYOUTS[1:],
}
PLAIN = cases.variations(
    cases.DecodeLinear(),
    {"norm": False, "bias": False, "rows": 1},
    {"norm": False, "in_features": 160, "out_features": 300, "rows": 4},
    {"norm": False, "layout": "transposed"},
    {"rows": 1, "in_features": 1536, "out_features": 768},
    {"rows": 1, "in_features": 13000},
    {"rows": 1, "in_features": 96, "layouts": {"z": "sliced"}},
    norm=[False],
    z=[False],
    layouts=[{"x": "transposed"}, {"weight": "sliced"}, {"z": "step2"}],
    dtypes=[{"norm_weight": torch.bfloat16}, {"bias": torch.float16}],
    **SIZES,
)
TILES = cases.variations(
    cases.DecodeLinear(norm=False, z=False, rows=20, in_features=520, out_features=200),
    {"rows": 64, "in_features": 48, "out_features": 1536},
    {"rows": 64, "in_features": 5120, "out_features": 192},
    {"rows": 64, "in_features": 2048, "out_features": 2101},
    {"rows": 33, "in_features": 2560, "out_features": 1640},
    {"rows": 3, "in_features": 4096, "out_features": 1032},
    {"rows": 7, "in_features": 64, "out_features": 65600},
    rows=[3, 16, 17, 32, 33, 64, 65, 150],
    in_features=[8, 64, 72, 130, 1000, 1536],
    out_features=[1, 2, 7, 32, 33, 80, 768, 3352],
    bias=[False],
    layouts=[{"x": "transposed"}, {"x": "sliced"}, {"weight": "sliced"}],
    layout=poison.LAYOUTS[1:],
    dtypes=[{"bias": torch.bfloat16}],
)
PRENORM = cases.variations(
    cases.DecodeLinearPrenorm(),
    {"residual": False, "residual_in_fp32": True},
    {"rows": 1, "in_features": 768, "out_features": 3352},
    {"rows": 1, "in_features": 2560, "out_features": 7000},
    residual=[False],
    residual_in_fp32=[True],
    layouts=[{"residual": "transposed"}, {"residual": "sliced"}, {"norm_weight": "step2"}],
    dtypes=[{"norm_weight": torch.float16}],
    **SIZES,
)


def with_own_residual(rows):
    """Also with residuals of the type of x."""
    for label, case in rows.items():
        yield pytest.param(case, id=f"prenorm-{label}")
        if case.residual and case.dtype in (torch.bfloat16, torch.float16) and not case.dtypes:
            narrow = dataclasses.replace(case, dtypes={"residual": case.dtype})
            yield pytest.param(narrow, id=f"prenorm-{label}-narrow")


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(c, id=n) for n, c in cases.with_dtypes(PLAIN).items()),
        *(pytest.param(c, id=f"tiles-{n}") for n, c in cases.with_dtypes(TILES).items()),
        *with_own_residual(cases.with_dtypes(PRENORM)),
    ],
)
def test_against_oracle(case, device):
    compare.check_call(case.call(device))


CASES = {
    "plain": cases.DecodeLinear(rows=5, in_features=264, out_features=70, norm=False),
    "shared": cases.DecodeLinear(rows=40, in_features=1096, out_features=70, norm=False),
    "gate": cases.DecodeLinear(rows=5, in_features=264, out_features=70),
    "prenorm": cases.DecodeLinearPrenorm(rows=5, in_features=264, out_features=70),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
floats = pytest.mark.parametrize("dtype", cases.FLOATS)


@each
@floats
def test_laws(case, dtype, device):
    """The same bits with any number of threads, at any place, run to run."""
    call = dataclasses.replace(case, dtype=dtype).call(device)
    properties.check_thread_count(call)
    properties.check_repeats(call)
    properties.check_row_position(call)


@each
@floats
@pytest.mark.parametrize("in_features", [264, 33])
def test_a_row_is_that_row_alone(case, dtype, in_features, device):
    """Or with copies of itself, where one or two rows are summed in an order of their own."""
    call = dataclasses.replace(case, dtype=dtype, in_features=in_features).call(device)
    copies = 3 if device == "cuda" and not case.norm else 1
    rows = call.invoke()
    for i in range(case.rows):
        of_row = {
            name: call.arguments[name][i : i + 1].repeat(copies, 1)
            for name in ("x", "z", "residual")
            if name in call.arguments
        }
        for name, alone in call.invoke(**of_row).items():
            assert torch.equal(alone[0], rows[name][i]), name


def step_of(op):
    return {"decode_linear": ops.step_linear, "decode_linear_prenorm": ops.step_linear_prenorm}[op]


@each
@pytest.mark.parametrize("leading", [(1,), (1, 1), (2, 2), (70,)])
def test_step(case, leading, device):
    """Any leading axes; on a CPU, and for many rows, the result of the separate operations."""
    rows = torch.Size(leading).numel()
    call = dataclasses.replace(case, rows=rows).call(device)
    together = call.invoke()
    arguments = {
        name: value.reshape(*leading, -1) if name in ("x", "z", "residual") else value
        for name, value in call.arguments.items()
    }
    results = step_of(call.op)(**arguments)
    results = results if isinstance(results, tuple) else (results,)
    for result, expected in zip(results, together.values(), strict=True):
        assert result.shape[:-1] == leading
        torch.testing.assert_close(result.flatten(0, -2), expected, rtol=1e-5, atol=1e-4)


@fused_only
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is chosen on a GPU")
@each
@pytest.mark.parametrize("rows, taken", [(1, True), (9, False)])
def test_cuda_step_takes_the_kernel(case, rows, taken):
    call = dataclasses.replace(case, rows=rows).call("cuda")
    with torch.profiler.profile() as profile:
        step_of(call.op)(**call.arguments)
    assert (f"mamba_ssm::{call.op}" in [event.key for event in profile.key_averages()]) == taken


@fused_only
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="the tiles are of compute capability 9.0",
)
@pytest.mark.parametrize(
    "dtype, rows, in_features, out_features, taken",
    [
        (torch.bfloat16, 64, 1536, 80, True),
        (torch.float16, 3, 1536, 80, True),
        (torch.bfloat16, 65, 1536, 80, False),
        (torch.bfloat16, 64, 1540, 80, False),
        (torch.bfloat16, 64, 4096, 4096, False),
        (torch.float32, 64, 1536, 80, False),
    ],
)
def test_cuda_step_takes_tiles(dtype, rows, in_features, out_features, taken):
    x = torch.randn(rows, in_features, device="cuda", dtype=dtype)
    weight = torch.randn(out_features, in_features, device="cuda", dtype=dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.step_linear(x, weight)
        torch.cuda.synchronize()
    assert any("by_tiles" in event.key for event in profile.key_averages()) == taken


@each
def test_step_is_differentiable(case, device):
    call = dataclasses.replace(case, rows=1, dtype=torch.float64).call(device)
    names = [
        n for n in ("x", "weight", "bias", "z", "residual", "norm_weight") if n in call.arguments
    ]

    def function(*tensors):
        return step_of(call.op)(**{**call.arguments, **dict(zip(names, tensors))})

    tensors = [call.arguments[n].detach().clone()[..., :5].requires_grad_() for n in names]
    index = names.index("weight")
    tensors[index] = call.arguments["weight"][:5, :5].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, tensors)


def test_step_under_autocast(device):
    x, weight = torch.randn(1, 64, device=device), torch.randn(32, 64, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = ops.step_linear(x, weight)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, F.linear(x, weight))


def test_decode_linear_has_no_gradient(device):
    x, weight = torch.randn(1, 8, device=device), torch.randn(3, 8, device=device)
    out = ops.decode_linear(x.requires_grad_(), weight)
    with pytest.raises(RuntimeError, match="not implemented|derivative"):
        out.sum().backward()


# A block's decode step -------------------------------------------------------------------------


def make_block(mixer, device, **options):
    torch.manual_seed(0)
    kinds = {
        "Mamba": lambda dim: Mamba(dim, layer_idx=0),
        "Mamba2": lambda dim: Mamba2(dim, headdim=16, d_state=16, layer_idx=0),
    }
    return Block(64, kinds[mixer], norm_cls=RMSNorm, **options).to(device).eval()


def run_step(block, hidden, residual, device):
    params = InferenceParams(max_seqlen=9, max_batch_size=hidden.shape[0])
    with torch.no_grad():
        block(hidden.expand(-1, 4, -1).contiguous(), None, inference_params=params)
        params.seqlen_offset = 4
        return block(hidden, residual, inference_params=params)


@pytest.mark.parametrize("mixer", ["Mamba", "Mamba2"])
@pytest.mark.parametrize("residual_in_fp32", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_block_step(mixer, residual_in_fp32, given, batch, device, monkeypatch):
    """Norm and in_proj in one are the two of them."""
    block = make_block(mixer, device, residual_in_fp32=residual_in_fp32)
    hidden = torch.randn(batch, 1, 64, device=device)
    residual = torch.randn(batch, 1, 64, device=device) if given else None
    joint = run_step(block, hidden, residual, device)
    monkeypatch.setattr(Block, "_is_joint_step", lambda *_: False)
    apart = run_step(block, hidden, residual, device)
    for one, two in zip(joint, apart, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixer", ["Mamba", "Mamba2"])
@pytest.mark.parametrize("part", ["mixer", "norm", "mixer.in_proj", "mixer.out_proj"])
def test_block_step_calls_hooks(mixer, part, device):
    """What somebody put on a module, or in its place, is not passed over."""
    hidden = torch.randn(2, 1, 64, device=device)
    block = make_block(mixer, device)
    expected = run_step(block, hidden, None, device)
    calls = []
    module = block.get_submodule(part)
    assert is_unhooked(module)
    module.register_forward_hook(lambda *_: calls.append(part))
    hooked = run_step(block, hidden, None, device)
    assert len(calls) == 2  # the prompt and the step
    torch.testing.assert_close(hooked, expected)

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return 2 * self.inner(*args, **kwargs)

    if part in ("mixer.in_proj", "mixer.out_proj"):
        block = make_block(mixer, device)
        parent, _, name = part.rpartition(".")
        twice = copy.deepcopy(block.get_submodule(part))
        with torch.no_grad():
            twice.weight *= 2
        setattr(block.get_submodule(parent), name, Doubled(block.get_submodule(part)))
        replaced = run_step(block, hidden, None, device)
        setattr(block.get_submodule(parent), name, twice)
        torch.testing.assert_close(replaced, run_step(block, hidden, None, device))
