"""causal_conv1d_update and causal_conv1d_varlen_states."""

import dataclasses

import pytest
import torch
from harness import cases, compare, poison, properties

BASE = cases.ConvUpdate()
ROWS = cases.variations(
    BASE,
    {"num_slots": 9, "batch": 6, "seqlen": 3},
    {"num_slots": 9, "batch": 6, "index_dtype": torch.int64},
    {"ring": True, "seqlen": 3, "state_len": 5},
    {"ring": True, "seqlen": 9, "state_len": 4},
    {"ring": True, "num_slots": 7, "index_dtype": torch.int64, "state_len": 3},
    {"ring": True, "state_len": 1, "width": 1, "seqlen": 2},
    {"ring": True, "state_len": 11, "layout": "transposed"},
    {"seqlen": 2, "state_len": 9, "layout": "step2"},
    {"seqlen": 9, "state_len": 3, "num_slots": 5, "layout": "sliced"},
    {"seqlen": 0, "num_slots": 5},
    {"seqlen": 0, "ring": True},
    {"width": 1, "state_len": 0},
    {"bias": False, "silu": False},
    batch=[0, 1, 8],
    dim=[0, 1, 8, 64, 67],
    seqlen=[0, 1, 2, 3, 4, 16, 33, 70],
    width=[1, 2, 3, 5, 9],
    state_len=[4, 5, 16],
    num_slots=[3, 5, 40],
    ring=[True],
    bias=[False],
    silu=[False],
    layout=poison.LAYOUTS[1:],
    layouts=[{"conv_state": "transposed"}, {"x": "scalar"}],
    dtypes=[{"weight": torch.bfloat16}, {"bias": torch.float16}],
    exact=[True],
)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS.keys())
def test_against_oracle(case, dtype, device):
    if dtype == torch.float64:
        case = dataclasses.replace(case, dtypes={})
    compare.check_call(dataclasses.replace(case, dtype=dtype).call(device))


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("width, state_len", [(2, 1), (4, 3), (4, 6), (5, 4)])
@pytest.mark.parametrize("ring", [False, True])
def test_steps_equal_forward(dtype, width, state_len, ring, device):
    """Token by token through the cache, the outputs and the state of one forward call."""
    call = cases.Conv(width=width, dtype=dtype, seqlen=11).call(device)
    arguments = call.arguments
    x, past = arguments["x"], width - 1
    state = x.new_zeros(*x.shape[:2], state_len)
    position = torch.full((x.shape[0],), 37, dtype=torch.int32, device=device)
    if ring:
        for j in range(past):
            state[..., (37 - past + j) % state_len] = arguments["initial_states"][..., j]
    else:
        state[..., state_len - past :] = arguments["initial_states"]
    out = []
    for t in range(x.shape[-1]):
        out.append(
            torch.ops.mamba_ssm.causal_conv1d_update(
                x[..., t],
                state,
                arguments["weight"],
                arguments["bias"],
                position + t if ring else None,
                silu=arguments["silu"],
            )
        )
    results = call.invoke()
    tolerance = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(torch.stack(out, dim=-1), results["out"], **tolerance)
    if ring:
        columns = [(37 + x.shape[-1] - past + j) % state_len for j in range(past)]
        state = state[..., columns]
    assert torch.equal(state[..., state.shape[-1] - past :], results["final_states"])


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("sizes", [(3, 1, 4), (1, 1, 6), (8,), (2, 2, 2, 2)])
def test_any_split_equals_the_whole(ring, sizes, device):
    """Also where a call brings more tokens than the state holds."""
    case = cases.ConvUpdate(seqlen=8, state_len=4, ring=ring, dtype=torch.float64)
    whole = compare.run(case.call(device)).results
    call = case.call(device)
    x, position = call.arguments["x"], call.arguments.get("cache_seqlens")
    out, begin = [], 0
    for size in sizes:
        now = {} if position is None else {"cache_seqlens": position + begin}
        out.append(call.invoke(x=x[..., begin : begin + size], **now)["out"])
        begin += size
    torch.testing.assert_close(torch.cat(out, dim=-1), whole["out"])
    assert torch.equal(call.arguments["conv_state"], whole["conv_state"])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("negative", [-1, -2, -(2**31)])
def test_padding_slots(index_dtype, negative, device):
    call = cases.ConvUpdate(batch=4, num_slots=6, seqlen=2).call(device)
    before = call.arguments["conv_state"].clone()
    indices = torch.tensor([5, negative, 0, negative], dtype=index_dtype, device=device)
    out = call.invoke(conv_state_indices=indices)["out"]
    after = call.arguments["conv_state"]
    assert (out[[1, 3]] == 0).all() and (out[[0, 2]] != 0).any()
    assert torch.equal(after[1:5], before[1:5])
    assert not torch.equal(after[0], before[0]) and not torch.equal(after[5], before[5])


def test_nan_in_unused_slots(device):
    """Slots that no row names are neither read nor written."""
    call = cases.ConvUpdate(batch=2, num_slots=6).call(device)
    call.arguments["conv_state"][[0, 2, 3, 5]] = float("nan")
    indices = torch.tensor([4, 1], dtype=torch.int32, device=device)
    assert call.invoke(conv_state_indices=indices)["out"].isfinite().all()
    assert call.arguments["conv_state"][[0, 2, 3, 5]].isnan().all()
    assert call.arguments["conv_state"][[1, 4]].isfinite().all()


def test_state_as_a_view_of_a_pool(device):
    """Layers side by side in one pool: only the slots of this layer change."""
    call = cases.ConvUpdate(batch=2, dim=5, num_slots=3).call(device)
    pool = torch.randn(3, 4, 7, 5, device=device)  # slot, layer, column, channel
    before = pool.clone()
    state = pool[:, 2, 1:4].transpose(1, 2)
    indices = torch.tensor([2, 0], dtype=torch.int32, device=device)
    call.invoke(conv_state=state, conv_state_indices=indices)
    changed = pool != before
    assert changed[[0, 2], 2, 1:4].any()
    changed[[0, 2], 2, 1:4] = False
    assert not changed.any()


def test_properties(device):
    case = cases.ConvUpdate(batch=9, dim=200, seqlen=3, state_len=5)
    properties.check_thread_count(case.call(device))
    properties.check_repeats(case.call(device))
    properties.check_row_position(case.call(device))


def test_nan_stays_in_its_channel(device):
    call = cases.ConvUpdate(batch=3, dim=9, seqlen=4).call(device)
    call.arguments["x"][1, 4, 2] = float("nan")
    out = call.invoke()["out"]
    finite = out.isfinite()
    assert not finite[1, 4, 2:].any()
    finite[1, 4, 2:] = True
    assert finite.all()


# causal_conv1d_varlen_states --------------------------------------------------------------------

VARLEN = cases.variations(
    cases.VarlenStates(),
    {"total_tokens": 0, "num_sequences": 3},
    {"total_tokens": 2, "num_sequences": 6, "state_len": 3},
    total_tokens=[1, 7, 130],
    dim=[0, 1, 8, 67],
    num_sequences=[1, 2, 9],
    state_len=[0, 1, 2, 3, 7, 40],
    layout=poison.LAYOUTS[1:],
    index_dtype=[torch.int64],
    seed=[1, 2, 3],
)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("case", VARLEN.values(), ids=VARLEN.keys())
def test_varlen_states(case, dtype, device):
    """A copy: every bit is the token's own."""
    call = dataclasses.replace(case, dtype=dtype).call(device)
    outcome = compare.check_call(call)
    x, bounds = call.arguments["x"], call.arguments["cu_seqlens"].tolist()
    for i, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        kept = min(case.state_len, end - begin)
        state = outcome.results["out"][i]
        assert poison.same_bits(state[:, case.state_len - kept :], x[end - kept : end].t())
        assert (state[:, : case.state_len - kept] == 0).all()


def test_varlen_states_layout(device):
    result = cases.VarlenStates(dim=6, state_len=4).call(device).invoke()["out"]
    assert result.stride() == (24, 1, 6)


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_prefill_then_decode(dtype, device):
    """States of a packed prefill serve the first decode step of every sequence."""
    call = cases.Conv(batch=1, seqlen=20, initial_states=False, dtype=dtype).call(device)
    x, weight, bias = (call.arguments[n] for n in ("x", "weight", "bias"))
    bounds = [0, 1, 8, 10, 20]
    states = torch.ops.mamba_ssm.causal_conv1d_varlen_states(
        x[0].t(), torch.tensor(bounds, dtype=torch.int32, device=device), 3
    )
    token = torch.ones(4, 5, dtype=dtype, device=device)
    step = torch.ops.mamba_ssm.causal_conv1d_update(token, states, weight, bias, silu=True)
    for i, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        sequence = torch.cat([x[..., begin:end], token[i][None, :, None]], dim=-1)
        whole, _ = torch.ops.mamba_ssm.causal_conv1d(sequence, weight, bias, silu=True)
        tolerance = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}
        torch.testing.assert_close(step[i], whole[0, :, -1], **tolerance)
