"""One test for each bug that an implementation of these operations once had."""

import dataclasses
import inspect
import re

import pytest
import torch
from harness import cases, compare, oracle, poison, properties
from mamba_ssm import Mamba2
from mamba_ssm.modules.mamba2_simple import Mamba2Simple
from mamba_ssm.ops.triton.ssd_combined import (
    mamba_chunk_scan,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    mamba_split_conv1d_scan_ref,
)
from mamba_ssm.utils.generation import InferenceParams


def virtual_empty(elements, dtype, device):
    """Memory that the system hands out page by page as it is touched (CPU)."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if free < elements * dtype.itemsize * 1.1:
            pytest.skip("not enough GPU memory")
    return torch.empty(elements, dtype=dtype, device=device)


def far(values, strides, buffer):
    """A copy of `values` at the given strides in `buffer`."""
    view = buffer.as_strided(values.shape, strides)
    return view.copy_(values)


@pytest.fixture(autouse=True)
def give_memory_back():
    """What PyTorch keeps of these buffers is more than other processes on the GPU can spare."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


FAR = {"2^31": 2**31 + 2, "2^32": 2**32 + 2}


@pytest.fixture(params=FAR.values(), ids=FAR.keys())
def distance(request):
    return request.param


# Offsets past 2^31 and 2^32 ---------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["batch", "dim", "seqlen"])
def test_conv_index_past_32_bits(axis, distance, device):
    """Forward and backward, each stride in turn; also of the incoming gradient."""
    call = cases.Conv(batch=2, dim=2, seqlen=5, dtype=torch.bfloat16, initial_states=False).call(
        device
    )
    sizes = {"batch": 2, "dim": 2, "seqlen": 5}
    strides = {"batch": 16, "dim": 8, "seqlen": 1}
    strides[axis] = distance // (sizes[axis] - 1) + 64
    extent = sum((sizes[a] - 1) * strides[a] for a in sizes) + 1
    expected = compare.run(call)
    buffer = virtual_empty(extent, torch.bfloat16, device)
    x = far(call.arguments["x"], list(strides.values()), buffer).requires_grad_()
    results = call.invoke(x=x)
    assert poison.same_bits(results["out"], expected.results["out"])
    (dx,) = torch.autograd.grad(
        list(results.values()), x, [call.cotangents[n] for n in results], retain_graph=True
    )
    assert poison.same_bits(dx, expected.gradients["x"])
    del x
    dout = far(call.cotangents["out"], list(strides.values()), buffer)
    x = call.arguments["x"].detach().requires_grad_()
    results = call.invoke(x=x)
    (dx,) = torch.autograd.grad(list(results.values()), x, [dout, call.cotangents["final_states"]])
    assert poison.same_bits(dx, expected.gradients["x"])


@pytest.mark.parametrize("axis", ["batch", "dim", "seqlen"])
def test_scan_index_past_32_bits(axis, distance, device):
    call = cases.Scan(batch=2, dim=2, seqlen=5, dtype=torch.bfloat16).call(device)
    sizes = {"batch": 2, "dim": 2, "seqlen": 5}
    strides = {"batch": 16, "dim": 8, "seqlen": 1}
    strides[axis] = distance // (sizes[axis] - 1) + 64
    extent = sum((sizes[a] - 1) * strides[a] for a in sizes) + 1
    expected = compare.run(call)
    buffer = virtual_empty(extent, torch.bfloat16, device)
    for name in ("u", "delta", "z"):
        value = far(call.arguments[name], list(strides.values()), buffer).detach().requires_grad_()
        results = call.invoke(**{name: value})
        for result in results:
            assert poison.same_bits(results[result], expected.results[result])
        (gradient,) = torch.autograd.grad(
            list(results.values()), value, [call.cotangents[n] for n in results]
        )
        assert poison.same_bits(gradient, expected.gradients[name])


@pytest.mark.parametrize("name", ["B", "C"])
@pytest.mark.parametrize("axis", range(4), ids=["batch", "groups", "dstate", "seqlen"])
def test_scan_matrix_index_past_32_bits(name, axis, distance, device):
    call = cases.Scan(batch=2, dim=4, B=2, C=2, dstate=3, seqlen=5, dtype=torch.bfloat16).call(
        device
    )
    sizes, strides = (2, 2, 3, 5), [64, 32, 8, 1]
    strides[axis] = distance // (sizes[axis] - 1) + 64
    extent = sum((n - 1) * s for n, s in zip(sizes, strides)) + 1
    expected = compare.run(call)
    buffer = virtual_empty(extent, torch.bfloat16, device)
    value = far(call.arguments[name], strides, buffer).detach().requires_grad_()
    results = call.invoke(**{name: value})
    assert poison.same_bits(results["out"], expected.results["out"])
    (gradient,) = torch.autograd.grad(
        list(results.values()), value, [call.cotangents[n] for n in results]
    )
    assert poison.same_bits(gradient, expected.gradients[name])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("case", [cases.NormGated, cases.LayerNorm], ids=lambda case: case.op)
def test_norm_row_past_32_bits(case, axis, distance, device):
    """Every tensor of rows in turn, each axis, forward and backward: as with a short stride."""
    call = case(leading=(2, 2), dtype=torch.bfloat16).call(device)
    sizes, strides = (2, 2, 24), [128, 32, 1]

    def outcome(name, stride):
        strides[axis] = stride
        extent = sum((n - 1) * s for n, s in zip(sizes, strides)) + 1
        arguments, cotangents = dict(call.arguments), dict(call.cotangents)
        holder = cotangents if name == "out" else arguments
        buffer = virtual_empty(extent, holder[name].dtype, device)
        holder[name] = far(holder[name], strides, buffer)
        return compare.run(dataclasses.replace(call, arguments=arguments, cotangents=cotangents))

    for name in ("x", "z" if case is cases.NormGated else "residual", "out"):
        near = outcome(name, 66)
        beyond = outcome(name, distance // (sizes[axis] - 1) + 64)
        compare.check_same(call, near, beyond, f"depends on the strides of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_the_widest_rows(dtype, device):
    """No limit in bytes: forward and backward of the same width, whatever the residual's type."""
    for channels in (16384, 32768, 40000):
        compare.check_call(
            cases.LayerNorm(leading=(2,), channels=channels, dtype=dtype, is_rms_norm=True).call(
                device
            )
        )
        compare.check_call(cases.NormGated(leading=(2,), group=channels, dtype=dtype).call(device))


def test_norm_groups_must_divide(device):
    """No groups, or groups that leave channels over: refused."""
    x, weight = torch.randn(2, 24, device=device), torch.ones(24, device=device)
    for group_size in (0, -1, 5, 48):
        with pytest.raises(RuntimeError, match="group_size must divide channels = 24"):
            torch.ops.mamba_ssm.rms_norm_gated(x, weight, group_size=group_size)


@pytest.mark.parametrize("ring", [False, True])
def test_conv_state_pool_past_32_bits(ring, distance, device):
    call = cases.ConvUpdate(batch=2, num_slots=3, dtype=torch.bfloat16, ring=ring).call(device)
    stride = distance // 2 + 64
    buffer = virtual_empty(2 * stride + 64, torch.bfloat16, device)
    state = far(call.arguments["conv_state"], [stride, 3, 1], buffer)
    indices = torch.tensor([2, 0], dtype=torch.int32, device=device)
    far_out = call.invoke(conv_state=state, conv_state_indices=indices)["out"]
    out = call.invoke(conv_state_indices=indices)["out"]
    assert poison.same_bits(out, far_out)
    assert poison.same_bits(state.contiguous(), call.arguments["conv_state"])


@pytest.mark.parametrize("nheads", [None, 2])
def test_ssm_state_pool_past_32_bits(nheads, distance, device):
    call = cases.StateUpdate(batch=2, nheads=nheads, num_slots=3, dtype=torch.bfloat16).call(device)
    stride = distance // 2 + 64
    buffer = virtual_empty(2 * stride + 256, torch.bfloat16, device)
    near = call.arguments["state"].bfloat16()
    state = far(near, [stride, *near.stride()[1:]], buffer)
    indices = torch.tensor([2, 0], dtype=torch.int32, device=device)
    far_out = call.invoke(state=state, state_batch_indices=indices)["out"]
    near = near.clone()
    out = call.invoke(state=near, state_batch_indices=indices)["out"]
    assert poison.same_bits(out, far_out)
    assert poison.same_bits(state.contiguous(), near)


def test_varlen_states_past_32_bits(distance, device):
    call = cases.VarlenStates(total_tokens=5, num_sequences=2, dtype=torch.bfloat16).call(device)
    stride = distance // 4 + 64
    buffer = virtual_empty(4 * stride + 64, torch.bfloat16, device)
    x = far(call.arguments["x"], [stride, 1], buffer)
    assert poison.same_bits(call.invoke(x=x)["out"], call.invoke()["out"])


@pytest.mark.full
def test_scan_with_more_than_2_31_elements(device):
    """Dense: u and its relatives themselves are that large."""
    batch, dim, seqlen = 1, 2**16 + 1, 2**15
    if device == "cpu":
        pytest.skip("needs more memory than a test may take on a CPU")
    free, _ = torch.cuda.mem_get_info()
    if free < 60e9:
        pytest.skip("not enough GPU memory")
    u = torch.randn(batch, dim, seqlen, device=device, dtype=torch.bfloat16)
    A = -torch.rand(dim, 2, device=device)
    B = torch.randn(batch, 2, seqlen, device=device, dtype=torch.bfloat16)
    out, _ = torch.ops.mamba_ssm.selective_scan(u, u, A, B, B, delta_softplus=True)
    last, _ = torch.ops.mamba_ssm.selective_scan(
        u[:, -3:], u[:, -3:], A[-3:], B, B, delta_softplus=True
    )
    torch.testing.assert_close(out[:, -3:], last)


# Decode -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("headdim", [1, 16, 17])
def test_step_leaves_neighbours_alone(headdim, device):
    """headdim below a block's width: nothing behind the state is read or written."""
    for case in (
        cases.StateUpdate(nheads=3, dim=headdim, dstate=16, num_slots=5),
        cases.ConvUpdate(dim=headdim, num_slots=5),
    ):
        compare.check_call(case.call(device))  # red zones around every tensor


def test_repeated_step_is_identical(device):
    for case in (
        cases.StateUpdate(nheads=4, dim=64, dstate=128, batch=8),
        cases.ConvUpdate(dim=200),
    ):
        properties.check_repeats(case.call(device), count=50)


@pytest.mark.parametrize("optional", ["D", "z", "dt_bias"])
@pytest.mark.parametrize("nheads", [None, 4])
@pytest.mark.parametrize("tied", [None, "head", "channel"])
def test_step_without_optional_arguments(optional, nheads, tied, device):
    """D = None and dt_bias = None are no errors, whichever decay path is taken."""
    case = cases.StateUpdate(nheads=nheads, tied=tied, **{optional: False})
    compare.check_call(case.call(device))


def test_step_with_head_dimension_of_D(device):
    compare.check_call(cases.StateUpdate(nheads=4, dim=16, D=True).call(device))


@pytest.mark.parametrize("prompt", [1, 2, 3])
def test_short_prompts(prompt, device):
    """A prompt shorter than the convolution, then decode: the first token too."""
    whole = cases.Conv(seqlen=prompt + 3, initial_states=False).call(device)
    x, weight, bias = (whole.arguments[n] for n in ("x", "weight", "bias"))
    expected = whole.invoke()["out"]
    out, state = torch.ops.mamba_ssm.causal_conv1d(x[..., :prompt], weight, bias, silu=True)
    torch.testing.assert_close(out, expected[..., :prompt])
    for t in range(prompt, prompt + 3):
        step = torch.ops.mamba_ssm.causal_conv1d_update(x[..., t], state, weight, bias, silu=True)
        torch.testing.assert_close(step, expected[..., t])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negative_cache_seqlens(dtype, device):
    """The remainder of a negative position is positive."""
    case = cases.ConvUpdate(batch=4, ring=True, state_len=5, dtype=dtype)
    call = case.call(device)
    positions = torch.tensor([-1, -6, -(2**31), 4], dtype=torch.int32, device=device)
    other = torch.tensor([4, 4, -(2**31) % 5, 4], dtype=torch.int32, device=device)
    first = call.invoke(cache_seqlens=positions)["out"]
    state = call.arguments["conv_state"].clone()
    call.arena.restore()
    assert poison.same_bits(first, call.invoke(cache_seqlens=other)["out"])
    assert poison.same_bits(state, call.arguments["conv_state"])
    call.arena.check(mutable=call.mutable)


@pytest.mark.parametrize("state", cases.FLOATS)
@pytest.mark.parametrize("x", cases.FLOATS)
@pytest.mark.parametrize("dt", cases.FLOATS)
def test_types_of_dt_and_state(state, x, dt, device):
    """Every combination is right or refused with the list of what is supported."""
    dtypes = {"state": state, "dt": dt}
    if x == torch.float64:
        dtypes |= dict.fromkeys(("A", "D", "dt_bias"), torch.float64)
    call = cases.StateUpdate(dtype=x, dtypes=dtypes).call(device)
    promised = dt in (x, torch.float32) and (x == torch.float64) == (dt == torch.float64)
    promised &= torch.float64 not in (state, x) or state == x
    if promised:
        compare.check_call(call)
        return
    truth = oracle.exact(call.op, call.arguments).results
    try:
        out = call.invoke()["out"]
    except RuntimeError as error:
        assert re.search("(dt|state|x) must have dtype .*, got", str(error)), error
        call.arena.check()
    else:
        tolerance = 32 * torch.finfo(x).eps * truth["out"].abs().max().item()
        torch.testing.assert_close(out.cpu().double(), truth["out"], rtol=0, atol=tolerance)


# Shapes and strides -----------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [None, "packed"])
@pytest.mark.parametrize("dim", [1, 7, 9, 12, 20])
@pytest.mark.parametrize("layout", ["transposed", "offset", "sliced", "contiguous"])
def test_conv_strides_not_multiples_of_8(packing, dim, layout, device):
    case = cases.Conv(dim=dim, seqlen=24, packing=packing, layout=layout, dtype=torch.bfloat16)
    compare.check_call(case.call(device))


@pytest.mark.parametrize("dim", [1, 3, 6, 9, 15])
def test_channels_not_multiple_of_8(dim, device):
    compare.check_call(cases.Conv(dim=dim, layout="transposed").call(device))
    compare.check_call(cases.Scan(dim=dim).call(device))


@pytest.mark.parametrize("dstate", [255, 256, 257, 300, 512, 1024])
def test_dstate_above_256(dstate, device):
    compare.check_call(cases.Scan(dim=2, batch=1, seqlen=6, dstate=dstate).call(device))
    compare.check_call(cases.StateUpdate(dim=2, dstate=dstate).call(device))


@pytest.mark.parametrize("packing", [None, "single"])
def test_conv_length_1026_with_final_states(packing, device):
    case = cases.Conv(batch=1, dim=3, seqlen=1026, packing=packing, dtype=torch.bfloat16)
    for layout in ("contiguous", "transposed"):
        compare.check_call(dataclasses.replace(case, layout=layout).call(device))


@pytest.mark.parametrize(
    "layout", ["transposed", "sliced", "step2", "expanded", "scalar", "offset"]
)
def test_conv_with_any_incoming_gradient(layout, device):
    for x_layout in ("contiguous", "transposed"):
        layouts = {"dout": layout, "dfinal_states": layout}
        compare.check_call(cases.Conv(layout=x_layout, layouts=layouts).call(device))


@pytest.mark.parametrize("seqlen", [1, 2, 3])
@pytest.mark.parametrize("width", [4, 5, 9])
@pytest.mark.parametrize("only_result", [None, "final_states"])
def test_chunk_shorter_than_the_window(seqlen, width, only_result, device):
    """Old columns pass through to the final states, and so do their gradients."""
    case = cases.Conv(seqlen=seqlen, width=width, only_result=only_result, dtype=torch.float64)
    compare.check_call(case.call(device))
    properties.gradcheck(dataclasses.replace(case, dim=2, only_result=None).call(device))


@pytest.mark.parametrize("dim", [1, 31, 33, 63, 64, 65])
def test_weights_of_few_channels(dim, device):
    for layout in ("contiguous", "transposed"):
        compare.check_call(cases.Conv(dim=dim, layout=layout, dtype=torch.float16).call(device))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "step2", "scalar", "offset"])
@pytest.mark.parametrize("name", ["D", "z", "delta", "delta_bias", "A", "initial_state"])
def test_scan_with_strided_arguments(layout, name, device):
    compare.check_call(cases.Scan(layouts={name: layout}).call(device))


@pytest.mark.parametrize("groups", [2, 3, 6])
@pytest.mark.parametrize("complex_A", [False, True])
def test_gradients_of_groups(groups, complex_A, device):
    case = cases.Scan(B=groups, C=groups, complex_A=complex_A, dtype=torch.float64)
    compare.check_call(case.call(device))
    properties.gradcheck(case.call(device), fast_mode=True)


@pytest.mark.parametrize("seqlen", [33, 63, 65, 100, 257])
def test_softplus_and_bias_at_any_length(seqlen, device):
    compare.check_call(cases.Scan(seqlen=seqlen, dim=3).call(device))


def test_softplus_gradient_above_the_threshold(device):
    call = cases.Scan(dtype=torch.float64, exact=True).call(device)
    assert (call.arguments["delta"] > 20).any()
    compare.check_call(call)


@pytest.mark.parametrize("form", [1, 3, "constant"])
def test_gradients_of_B_and_C_with_seq_idx(form, device):
    for packing in ("packed", "padded"):
        case = cases.Scan(B=form, C=form, packing=packing, dtype=torch.float64, seqlen=40)
        compare.check_call(case.call(device))
        properties.gradcheck(case.call(device), fast_mode=True)


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_states_reset_between_sequences(packing, device):
    """An enormous state before a boundary leaves no trace behind it."""
    ids = torch.tensor([[4] * 6 + [2] * 6, [1] * 3 + [9] * 9], dtype=torch.int32, device=device)
    for scale in (1.0, 1e30):
        call = cases.Scan(seqlen=12, packing=packing).call(device)
        call.arguments["initial_state"].fill_(scale)
        out = call.invoke(seq_idx=ids)["out"]
        if scale == 1.0:
            expected = out
    assert poison.same_bits(out[0, :, 6:], expected[0, :, 6:])
    assert poison.same_bits(out[1, :, 3:], expected[1, :, 3:])


def test_constant_B_is_in_the_last_state(device):
    case = cases.Scan(B="constant", C=1, dtype=torch.float64)
    call = case.call(device)
    truth = oracle.exact(call.op, call.arguments).results["last_state"]
    torch.testing.assert_close(call.invoke()["last_state"].cpu(), truth)


# SSD ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["batch", "seqlen", "nheads", "headdim"])
def test_ssd_index_past_32_bits(axis, distance, device):
    """Forward and backward, each stride of x, z and dt in turn; also of the incoming gradient."""
    call = cases.Ssd(batch=2, seqlen=5, nheads=2, headdim=3, dtype=torch.bfloat16).call(device)
    sizes = {"batch": 2, "seqlen": 5, "nheads": 2, "headdim": 3}
    strides = {"batch": 64, "seqlen": 8, "nheads": 4, "headdim": 1}
    strides[axis] = distance // (sizes[axis] - 1) + 64
    extent = sum((sizes[a] - 1) * strides[a] for a in sizes) + 1
    expected = compare.run(call)
    buffer = virtual_empty(extent, torch.bfloat16, device)
    for name in ("x", "z", "dt") if axis != "headdim" else ("x", "z"):
        value = call.arguments[name]
        value = far(value, list(strides.values())[: value.dim()], buffer).detach().requires_grad_()
        results = call.invoke(**{name: value})
        for result in results:
            assert poison.same_bits(results[result], expected.results[result])
        (gradient,) = torch.autograd.grad(
            list(results.values()), value, [call.cotangents[n] for n in results]
        )
        assert poison.same_bits(gradient, expected.gradients[name])
    dout = far(call.cotangents["out"], list(strides.values()), buffer)
    x = call.arguments["x"].detach().requires_grad_()
    results = call.invoke(x=x)
    (dx,) = torch.autograd.grad(list(results.values()), x, [dout, call.cotangents["final_states"]])
    assert poison.same_bits(dx, expected.gradients["x"])


@pytest.mark.parametrize("name", ["B", "C", "initial_states"])
@pytest.mark.parametrize("axis", range(4))
def test_ssd_matrix_index_past_32_bits(name, axis, distance, device):
    call = cases.Ssd(
        batch=2,
        seqlen=5,
        headdim=3,
        dtype=torch.bfloat16,
        dtypes={"initial_states": torch.bfloat16},
    ).call(device)
    value = call.arguments[name]
    strides = [512, 64, 8, 1]
    strides[axis] = distance // (value.shape[axis] - 1) + 64
    extent = sum((n - 1) * s for n, s in zip(value.shape, strides)) + 1
    expected = compare.run(call)
    buffer = virtual_empty(extent, torch.bfloat16, device)
    value = far(value, strides, buffer).detach().requires_grad_()
    results = call.invoke(**{name: value})
    for result in results:
        assert poison.same_bits(results[result], expected.results[result])
    (gradient,) = torch.autograd.grad(
        list(results.values()), value, [call.cotangents[n] for n in results]
    )
    assert poison.same_bits(gradient, expected.gradients[name])


def run_ssd(a, **options):
    """mamba_chunk_scan_combined with the arguments of a case, float64 states."""
    options = {"return_final_states": True, "dt_softplus": True} | options
    names = ("D", "z", "dt_bias", "initial_states", "seq_idx", "cu_seqlens")
    arguments = {name: a[name] for name in names if name in a} | options
    return mamba_chunk_scan_combined(
        *(a[name] for name in ("x", "dt", "A", "B", "C")), 8, **arguments
    )


@pytest.mark.parametrize("first", [0, 1, 7])
def test_ssd_initial_states_reach_the_first_sequence(first, device):
    """Whatever its id: nothing makes id 0 special."""
    a = cases.Ssd(dtype=torch.float64).call(device).arguments
    ids = torch.full((2, 19), first, device=device)
    for actual, expected in zip(run_ssd(a | {"seq_idx": ids}), run_ssd(a)):
        torch.testing.assert_close(actual, expected)


def test_ssd_gradient_with_padding(device):
    """That of the forward, also through outputs in padding and final states."""
    for packing in ("padded", "blank"):
        case = cases.Ssd(packing=packing, seqlen=20, dtype=torch.float64, headdim=2)
        compare.check_call(case.call(device))
        properties.gradcheck(case.call(device), fast_mode=True)


def test_ssd_final_states_of_a_padded_row(device):
    """A row that ends in padding hands on the state of its last token, and padding gives 0."""
    a = cases.Ssd(dtype=torch.float64, seqlen=13).call(device).arguments
    ids = torch.tensor([[0] * 13, [0] * 6 + [-1] * 7], device=device)
    out, final = run_ssd(a | {"seq_idx": ids})
    short = {n: v[1:, :6] if n in ("x", "dt", "B", "C", "z") else v for n, v in a.items()}
    expected_out, expected = run_ssd(short | {"initial_states": a["initial_states"][1:]})
    torch.testing.assert_close(final[1:], expected)
    torch.testing.assert_close(out[1:, :6], expected_out)
    assert (out[1, 6:] == 0).all()


def test_ssd_cu_seqlens_alone_isolates(device):
    """An enormous state before a boundary leaves no trace behind it, without seq_idx."""
    bounds = torch.tensor([0, 5, 20], dtype=torch.int32, device=device)
    outcomes = []
    for scale in (1.0, 1e30):
        a = cases.Ssd(batch=1, seqlen=20, initial_states=False).call(device).arguments
        a["x"][:, :5] *= scale
        outcomes.append(run_ssd(a | {"cu_seqlens": bounds}, return_varlen_states=True))
    (out, final, varlen), (other_out, other_final, other_varlen) = outcomes
    assert poison.same_bits(out[:, 5:], other_out[:, 5:])
    assert poison.same_bits(final, other_final)
    assert poison.same_bits(varlen[1], other_varlen[1])


@pytest.mark.parametrize("first", [3, 8, 9])
def test_ssd_initial_state_in_varlen_states(first, device):
    """Also when the first sequence ends inside the first chunk."""
    a = cases.Ssd(batch=1, seqlen=20, dtype=torch.float64).call(device).arguments
    bounds = torch.tensor([0, first, 20], device=device)
    *_, varlen = run_ssd(a | {"cu_seqlens": bounds}, return_varlen_states=True)
    alone = {n: v[:, :first] if n in ("x", "dt", "B", "C", "z") else v for n, v in a.items()}
    torch.testing.assert_close(varlen[:1], run_ssd(alone)[1])


def test_ssd_leading_empty_sequence(device):
    """cu_seqlens that starts 0, 0: its state is the initial one, and nothing is read before 0."""
    case = cases.Ssd(batch=1, seqlen=20, num_sequences=3, dtype=torch.float64)
    call = case.call(device)
    call.arguments["cu_seqlens"].copy_(torch.tensor([0, 0, 7, 20]))
    call.arena = poison.Arena(device)
    outcome = compare.check_call(call, rerun=False)
    assert torch.equal(outcome.results["final_states"][0], call.arguments["initial_states"][0])


@pytest.mark.parametrize("seqlen", [1, 7, 9, 17])
def test_ssd_reference_of_any_length(seqlen, device):
    """The plain scan needs no multiple of chunk_size."""
    a = cases.Ssd(seqlen=seqlen, dtype=torch.float64, initial_states=False).call(device).arguments
    plain = mamba_chunk_scan(
        *(a[n] for n in ("x", "dt", "A", "B", "C")), 8, a["D"], a["z"], a["dt_bias"], True
    )
    torch.testing.assert_close(plain, run_ssd(a)[0])


def test_ssd_chunk_size_is_not_part_of_the_result(device):
    """States between chunks are not rounded to 16 bits."""
    call = cases.Ssd(seqlen=600, dtype=torch.bfloat16, headdim=8, dstate=16, z=False).call(device)
    call.arguments["A"].mul_(0.001)  # a long memory, in which rounding would add up
    call.arena = poison.Arena(device)
    compare.check_call(call, rerun=False)


def test_ssd_gradient_of_initial_states_has_their_dtype(device):
    for dtype in (torch.float32, torch.bfloat16):
        case = cases.Ssd(dtype=torch.bfloat16, dtypes={"initial_states": dtype})
        gradient = compare.run(case.call(device)).gradients["initial_states"]
        assert gradient.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("low, high", [(-60, -30), (-80, -70)])
def test_ssd_softplus_keeps_relative_accuracy(dtype, low, high, device):
    """log1p(exp(x)) is exp(x) there, not 0: the output keeps its digits."""
    call = cases.Ssd(
        dtype=dtype, dt_bias=False, initial_states=False, D=None, z=False, seqlen=1, dstate=1
    ).call(device)
    dt = call.arguments["dt"]
    dt.copy_(torch.linspace(low, high, dt.numel(), device=device).reshape(dt.shape))
    truth = oracle.exact(call.op, call.arguments).results["out"]
    out = call.invoke()["out"].cpu().double()
    assert ((out - truth).abs() <= 32 * torch.finfo(dtype).eps * truth.abs()).all()


@pytest.mark.parametrize("nheads", [1, 3, 5, 6, 7])
@pytest.mark.parametrize("seqlen", [1, 2, 3, 5, 66])
def test_ssd_heads_and_lengths_not_multiples_of_4(nheads, seqlen, device):
    compare.check_call(cases.Ssd(nheads=nheads, ngroups=1, seqlen=seqlen).call(device))


@pytest.mark.parametrize("seqlen", [33, 65, 100, 255, 256, 257, 300])
def test_ssd_softplus_and_bias_at_any_length(seqlen, device):
    compare.check_call(cases.Ssd(seqlen=seqlen, nheads=2, headdim=3).call(device))


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_ssd_gradients_of_groups(groups, device):
    case = cases.Ssd(nheads=6, ngroups=groups, dtype=torch.float64)
    compare.check_call(case.call(device))
    properties.gradcheck(case.call(device), fast_mode=True)


@pytest.mark.parametrize("headdim, dstate", [(16, 128), (128, 16), (96, 32), (200, 16), (512, 8)])
@pytest.mark.parametrize("D", ["head", "channel"])
def test_ssd_gradients_of_wide_and_narrow_heads(headdim, dstate, D, device):
    """Whichever of headdim and dstate is larger; dD with more channels than a tile has."""
    case = cases.Ssd(nheads=2, ngroups=1, seqlen=70, headdim=headdim, dstate=dstate, D=D)
    compare.check_call(case.call(device))


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_ssd_gradients_of_B_with_seq_idx(packing, device):
    for seed in range(3):
        case = cases.Ssd(packing=packing, seqlen=140, nheads=4, ngroups=2, headdim=3, seed=seed)
        compare.check_call(case.call(device))


@pytest.mark.parametrize("bad", [1, 100, 255, 257])
def test_ssd_chunked_prefill_at_any_cut(bad, device):
    """Chunked prefill that is not aligned to the chunks of a kernel."""
    a = cases.Ssd(seqlen=300, dtype=torch.float64).call(device).arguments
    whole, final = run_ssd(a)
    parts = []
    state = a["initial_states"]
    for begin, end in ((0, bad), (bad, 300)):
        piece = {n: v[:, begin:end] if n in ("x", "dt", "B", "C", "z") else v for n, v in a.items()}
        out, state = run_ssd(piece | {"initial_states": state})
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(state, final)


# Arguments --------------------------------------------------------------------------------------


def test_gradient_of_every_optional_argument(device):
    """Present or absent, in any combination: one gradient for each tensor, None for no other."""
    optional = ("D", "z", "delta_bias", "initial_state")
    for mask in range(16):
        present = {name: bool(mask >> i & 1) for i, name in enumerate(optional)}
        call = cases.Scan(seqlen=3, dim=2, dstate=2, B=1, C=1, dtype=torch.float64, **present).call(
            device
        )
        compare.check_call(call)
    for mask in range(4):
        case = cases.Conv(bias=bool(mask & 1), initial_states=bool(mask & 2), dtype=torch.float64)
        compare.check_call(case.call(device))
    for mask in range(16):
        case = cases.Ssd(
            seqlen=3,
            headdim=2,
            dstate=2,
            D="head" if mask & 1 else None,
            z=bool(mask & 2),
            dt_bias=bool(mask & 4),
            initial_states=bool(mask & 8),
            dtype=torch.float64,
        )
        compare.check_call(case.call(device))


def test_works_without_a_gpu():
    """CPU tensors compute, whatever else the machine has."""
    for case in (
        cases.Conv(),
        cases.ConvUpdate(),
        cases.Scan(),
        cases.StateUpdate(),
        cases.Ssd(),
        cases.Inner(),
        cases.Inner2(),
    ):
        assert case.call("cpu").invoke()["out"].device.type == "cpu"


def test_conv_takes_old_and_new_positional_arguments():
    """causal_conv1d_cuda's functions grew arguments over the years."""
    extension = pytest.importorskip("causal_conv1d_cuda")
    x, weight, bias = torch.randn(2, 8, 9), torch.randn(8, 4), torch.randn(8)
    expected, _ = torch.ops.mamba_ssm.causal_conv1d(x, weight, bias, silu=True)
    old = extension.causal_conv1d_fwd(x, weight, bias, True)
    new = extension.causal_conv1d_fwd(x, weight, bias, None, None, None, True)
    assert torch.equal(old, expected) and torch.equal(new, expected)


def test_conv_function_signature():
    interface = pytest.importorskip("causal_conv1d")
    names = list(inspect.signature(interface.causal_conv1d_fn).parameters)
    assert names == [
        "x",
        "weight",
        "bias",
        "seq_idx",
        "initial_states",
        "return_final_states",
        "final_states_out",
        "activation",
    ]


@pytest.mark.parametrize("groups", [0, 4])
def test_groups_that_do_not_divide(groups, device):
    B = torch.randn(2, groups, 3, 5, device=device)
    u = torch.randn(2, 6, 5, device=device)
    with pytest.raises(RuntimeError, match="selective_scan: B "):
        torch.ops.mamba_ssm.selective_scan(u, u, torch.randn(6, 3, device=device), B, B)


# Mamba-2 blocks ---------------------------------------------------------------------------------


def mamba2(kind=Mamba2, **options):
    torch.manual_seed(0)
    options = {"d_model": 12, "d_state": 5, "headdim": 4, "dtype": torch.float64, **options}
    return kind(**options)


def stepped(block, x):
    states = block.allocate_inference_cache(len(x), x.shape[1])
    with torch.no_grad():
        return torch.cat([block.step(x[:, t : t + 1], *states)[0] for t in range(x.shape[1])], 1)


def test_mamba2_inner_projects_out_without_norm_beside_an_mlp(device):
    """out_proj's gradient has the columns of the MLP too."""
    case = cases.Inner2(norm=False, d_nonssm=5)
    outcome = compare.check_call(case.call(device))
    assert outcome.gradients["out_proj_weight"].shape == (5, 17)


def test_mamba2_reference_normalizes_by_group(device):
    a = cases.Inner2(dtype=torch.float64, ngroups=2, seqlen=9).call(device).arguments
    names = ("zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "A", "D")
    options = {"rmsnorm_weight": a["norm_weight"], "headdim": 3, "ngroups": 2}
    arguments = [*(a[name] for name in names), 8]
    expected = mamba_split_conv1d_scan_combined(*arguments, **options)
    torch.testing.assert_close(mamba_split_conv1d_scan_ref(*arguments, **options), expected)


def test_mamba2_step_limits_steps():
    block, x = mamba2(dt_limit=(0.02, 0.05)), torch.randn(2, 6, 12, dtype=torch.float64)
    torch.testing.assert_close(stepped(block, x), block(x))
    block.dt_limit = (0.0, float("inf"))
    assert not torch.allclose(stepped(block, x), mamba2(dt_limit=(0.02, 0.05))(x))


def test_mamba2_step_with_D_per_channel():
    block, x = mamba2(D_has_hdim=True), torch.randn(2, 6, 12, dtype=torch.float64)
    with torch.no_grad():
        block.D.uniform_(0.5, 1.5)
    torch.testing.assert_close(stepped(block, x), block(x))


def test_mamba2_offsets_isolate_in_training():
    block, x = mamba2(), torch.randn(1, 9, 12, dtype=torch.float64)
    x.requires_grad_()
    out = block(x, cu_seqlens=torch.tensor([0, 4, 9]))
    (dx,) = torch.autograd.grad(out[:, 4:].sum(), x)
    assert (dx[:, :4] == 0).all() and dx[:, 4:].abs().sum() > 0


@pytest.mark.parametrize("kind", [Mamba2, Mamba2Simple])
def test_mamba2_normalizes_by_group_on_every_path(kind):
    block, x = mamba2(kind, ngroups=2), torch.randn(2, 6, 12, dtype=torch.float64)
    expected = block(x)
    block.use_mem_eff_path = False
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(stepped(block, x), expected)
    block.norm.group_size = None
    assert not torch.allclose(block(x), expected)


def test_mamba2_simple_isolates_in_the_convolution():
    block = mamba2(Mamba2Simple, use_mem_eff_path=False)
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    ids = torch.tensor([[0] * 4 + [1] * 5])
    out = block(x, seq_idx=ids)
    torch.testing.assert_close(out, torch.cat([block(x[:, :4]), block(x[:, 4:])], dim=1))


def test_mamba2_prefills_in_pieces():
    block, x = mamba2(layer_idx=0), torch.randn(2, 9, 12, dtype=torch.float64)
    params = InferenceParams(max_seqlen=9, max_batch_size=2)
    outputs = []
    with torch.no_grad():
        for piece in x.split([2, 5, 2], dim=1):
            outputs.append(block(piece, inference_params=params))
            params.seqlen_offset += piece.shape[1]
    torch.testing.assert_close(torch.cat(outputs, dim=1), block(x))


@pytest.mark.parametrize("use_mem_eff_path", [False, True])
def test_mamba2_heads_not_a_multiple_of_8(use_mem_eff_path):
    """Strides that no vector of 8 divides: 6 heads, 34 channels of the convolution."""
    block = mamba2(use_mem_eff_path=use_mem_eff_path)
    assert block.nheads == 6 and block.conv1d.weight.shape[0] == 34
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    torch.testing.assert_close(block(x), stepped(block, x))


# Numbers ----------------------------------------------------------------------------------------


def test_float32_in_gives_float32_accuracy(device):
    """No 16-bit or TF32 arithmetic inside: errors stay at a few units in the last place."""
    for case in (
        cases.Scan(dim=32, dstate=16, seqlen=64, initial_state=False),
        cases.Conv(dim=32, seqlen=64),
        cases.StateUpdate(nheads=4, dim=64, dstate=128),
        cases.Ssd(seqlen=130, headdim=32, dstate=16, initial_states=False),
        cases.Inner(dim=32, seqlen=40, dstate=16),
        cases.Inner2(seqlen=40, headdim=16, dstate=16, d_model=32),
    ):
        call = case.call(device)
        truth = oracle.exact(call.op, call.arguments).results["out"]
        error = (call.invoke()["out"].cpu().double() - truth).abs().max()
        assert error < 3e-6 * truth.abs().max()


def test_backward_is_deterministic(device):
    """The same bits in every run, without any mode being set."""
    case = cases.Scan(batch=4, dim=96, seqlen=200, dstate=16, B=2, C=2)
    properties.check_repeats(case.call(device), count=10)
    properties.check_repeats(cases.Conv(batch=4, dim=96, seqlen=200).call(device), count=10)
    case = cases.Ssd(batch=4, seqlen=200, nheads=8, headdim=16, dstate=16)
    properties.check_repeats(case.call(device), count=10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_near_the_largest_number(dtype, device):
    """Finite where the rounded truth is finite."""
    call = cases.Conv(dtype=dtype, silu=False).call(device)
    scale = torch.finfo(dtype).max / 64
    call.cotangents["out"].mul_(scale / call.cotangents["out"].abs().max())
    call.arguments["weight"].clamp_(-2, 2)
    call.arena = poison.Arena(device)
    compare.check_call(call, rerun=False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors():
    for case in (
        cases.Conv(),
        cases.ConvUpdate(),
        cases.Scan(),
        cases.StateUpdate(),
        cases.Ssd(packing="padded"),
    ):
        with torch.cuda.device(0):
            compare.check_call(case.call("cuda:1"))
