"""selective_state_update."""

import dataclasses

import pytest
import torch
from harness import cases, compare, poison, properties

BASE = cases.StateUpdate()
ROWS = cases.variations(
    BASE,
    {"nheads": 1},
    {"nheads": 4, "ngroups": 1},
    {"nheads": 4, "ngroups": 2, "dim": 8, "dstate": 16},
    {"nheads": 6, "ngroups": 6, "dim": 3},
    {"nheads": 4, "ngroups": 2, "tied": "head", "dim": 16, "dstate": 33},
    {"nheads": 3, "tied": "head", "num_slots": 9},
    {"nheads": 4, "num_slots": 9, "batch": 6, "layout": "transposed"},
    {"num_slots": 9, "batch": 6, "index_dtype": torch.int64},
    {"D": False, "z": False, "dt_bias": False},
    {"D": False, "z": False, "dt_bias": False, "dt_softplus": False, "nheads": 2},
    {"nheads": 2, "D": False},
    {"nheads": 2, "z": False},
    {"nheads": 2, "dt_bias": False},
    {"nheads": 2, "dt_bias": False, "tied": "head"},
    {"nheads": 2, "layout": "sliced"},
    {"nheads": 2, "layout": "step2"},
    {"nheads": 2, "dim": 64, "dstate": 128},
    {"nheads": 0},
    {"A_is_log": True, "dstate": 16},
    {"A_is_log": True, "dstate": 16, "batch": 40, "dtypes": {"A": torch.bfloat16}},
    {"A_is_log": True, "dstate": 17, "layout": "step2"},
    {"A_is_log": True, "nheads": 4, "tied": "head", "dim": 16, "dstate": 64},
    {"A_is_log": True, "nheads": 4, "tied": "head", "dim": 16, "tokens": 3},
    {"tokens": 3, "nheads": 4, "ngroups": 2, "dim": 8, "dstate": 16, "num_slots": 9},
    {"tokens": 9, "nheads": 4, "tied": "head", "dim": 16, "dstate": 64},
    {"tokens": 2, "nheads": 2, "dim": 64, "dstate": 128, "intermediate_states": True},
    {"tokens": 0, "intermediate_states": True},
    {"tokens": 3, "batch": 6, "num_slots": 9, "intermediate_states": True},
    {"tokens": 3, "nheads": 3, "layout": "sliced", "intermediate_states": True},
    {"tokens": 3, "dstate": 16, "layout": "step2", "intermediate_states": True},
    {"tokens": 3, "dstate": 16, "layouts": {"intermediate_states": "step2"}}
    | {"intermediate_states": True},
    {"tokens": 3, "dstate": 16, "layouts": {"x": "sliced", "dt": "step2", "z": "transposed"}},
    {"tokens": 3, "nheads": 5, "ngroups": 5, "dstate": 16}
    | {"layouts": {"B": "sliced", "C": "sliced"}},
    {"tokens": 3, "dstate": 16, "dtypes": {"state": torch.bfloat16}, "intermediate_states": True},
    {"tokens": 20, "dstate": 17, "dtypes": {"state": torch.float16}},
    {"tokens": 3, "dstate": 16, "dtypes": {"intermediate_states": torch.float16}}
    | {"intermediate_states": True},
    {"tokens": 3, "exact": True},
    tokens=[1, 2, 8, 17],
    intermediate_states=[True],
    batch=[0, 1, 8],
    dim=[0, 1, 8, 64, 67],
    dstate=[0, 1, 2, 3, 8, 15, 16, 17, 64, 128, 300],
    num_slots=[3, 5, 40],
    D=[False],
    z=[False],
    dt_bias=[False],
    dt_softplus=[False],
    tied=["head", "channel"],
    A_is_log=[True],
    layout=poison.LAYOUTS[1:],
    layouts=[{"state": "transposed"}, {"A": "transposed"}, {"x": "scalar"}],
    dtypes=[
        {"A": torch.bfloat16},
        {"D": torch.float16, "dt_bias": torch.bfloat16},
        {"state": torch.float16},
        {"state": torch.bfloat16},
        {"state": torch.float32},
        {"dt": torch.float32},
        {"dt": torch.float32, "state": torch.float32},
    ],
    exact=[True],
)


@pytest.mark.parametrize("case", (rows := cases.with_dtypes(ROWS)).values(), ids=rows.keys())
def test_against_oracle(case, device):
    compare.check_call(case.call(device))


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("delta_bias", [False, True])
@pytest.mark.parametrize("optional", [False, True])
def test_steps_equal_scan(dtype, delta_bias, optional, device):
    """Token by token, the outputs and the state of selective_scan."""
    call = cases.Scan(
        dtype=dtype, B="flat", C="flat", delta_bias=delta_bias, D=optional, z=optional, seqlen=13
    ).call(device)
    a = call.arguments
    state = a["initial_state"].clone()
    out = []
    for t in range(13):
        out.append(
            torch.ops.mamba_ssm.selective_state_update(
                state,
                a["u"][..., t],
                a["delta"][..., t],
                a["A"],
                a["B"][..., t],
                a["C"][..., t],
                a.get("D"),
                a["z"][..., t] if optional else None,
                a.get("delta_bias"),
                dt_softplus=True,
            )
        )
    results = call.invoke()
    tolerance = {"rtol": 0, "atol": 32 * torch.finfo(dtype).eps}
    torch.testing.assert_close(torch.stack(out, dim=-1), results["out"], **tolerance)
    tolerance = {"rtol": 0, "atol": 32 * torch.finfo(state.dtype).eps}
    torch.testing.assert_close(state, results["last_state"], **tolerance)


# What chooses a kernel: rows of states dense or not, one decay for each head or not, rows that fill a
# GPU or not; and tokens that one pass takes or not.
SHAPES = {
    "dstate 16": {"dim": 40, "dstate": 16},
    "dstate 17": {"dim": 9, "dstate": 17},
    "dstate 300": {"dim": 9, "dstate": 300},
    "heads": {"nheads": 4, "ngroups": 2, "dim": 33, "dstate": 64},
    "one decay": {"nheads": 4, "ngroups": 2, "dim": 33, "dstate": 128, "tied": "head"},
    "one decay, dstate 256": {"nheads": 2, "dim": 16, "dstate": 256, "tied": "head"},
}
MANY_ROWS = {
    "many rows": {"batch": 37, "dim": 2048, "dstate": 16},
    "many rows, one decay": {"batch": 9, "nheads": 16, "dim": 64, "dstate": 128, "tied": "head"},
}
TOKENS = {
    f"{name}-{tokens}": (shape, tokens)
    for shapes, several in ((SHAPES, (1, 2, 8, 9, 20)), (MANY_ROWS, (3,)))
    for name, shape in shapes.items()
    for tokens in several
}


def _at(call, t):
    """What differs from token to token, of token t."""
    return {name: call.arguments[name][:, t] for name in ("x", "dt", "B", "C", "z")}


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("shape, tokens", TOKENS.values(), ids=TOKENS.keys())
def test_tokens_equal_steps(shape, tokens, dtype, device):
    """Several tokens in a call are a call for each, bit for bit, and so are the states on the way."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case = cases.StateUpdate(
        **shape,
        num_slots=40,
        dtype=dtype,
        dtypes={"state": wide, "intermediate_states": wide},
        tokens=tokens,
        intermediate_states=True,
    )
    call = case.call(device)
    state = call.arguments["state"].clone()
    out = call.invoke()["out"]
    kept = call.arguments["intermediate_states"]
    slots = call.arguments["state_batch_indices"].long()
    real = slots >= 0
    for t in range(tokens):
        one = call.invoke(state=state, intermediate_states=None, **_at(call, t))["out"]
        assert poison.same_bits(out[:, t], one)
        assert poison.same_bits(kept[real, t], state[slots[real]])
    assert poison.same_bits(call.arguments["state"], state)


@pytest.mark.parametrize("shape", MANY_ROWS.values(), ids=MANY_ROWS.keys())
@pytest.mark.parametrize("tokens", [None, 3])
def test_many_rows_equal_few(shape, tokens, device):
    """A row of a call that fills the GPU is that row in a call of its own."""
    call = cases.StateUpdate(**shape, num_slots=40, tokens=tokens).call(device)
    state = call.arguments["state"].clone()
    slots = call.arguments["state_batch_indices"]
    out = call.invoke()["out"]
    for b in (slots >= 0).nonzero()[[0, -1], 0].tolist():
        row = {name: call.arguments[name][b : b + 1] for name in ("x", "dt", "B", "C", "z")}
        one = call.invoke(state=state, state_batch_indices=slots[b : b + 1], **row)["out"]
        torch.testing.assert_close(out[b : b + 1], one, rtol=1e-5, atol=1e-5)
        slot = slots[b].item()
        torch.testing.assert_close(call.arguments["state"][slot], state[slot])


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [None, "head"])
@pytest.mark.parametrize("dstate", [16, 17, 128])
def test_16_bit_state_is_rounded_once(dstate, tied, dtype, tokens, device):
    """From token to token a 16-bit state is float32: the states on the way are those of a float32
    state, and the last is that, rounded."""
    case = cases.StateUpdate(
        nheads=3, dim=10, dstate=dstate, tied=tied, tokens=tokens, intermediate_states=True
    )
    call = dataclasses.replace(
        case, dtype=dtype, dtypes={"intermediate_states": torch.float32}
    ).call(device)
    kept = call.arguments["intermediate_states"]
    narrow = call.arguments["state"].clone()
    wide = narrow.float()
    out = call.invoke(state=narrow)["out"]
    kept_of_narrow = kept.clone()
    out_of_wide = call.invoke(state=wide)["out"]
    assert poison.same_bits(kept_of_narrow, kept)
    assert poison.same_bits(narrow, wide.to(dtype))
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-3}  # sums may run in another order
    torch.testing.assert_close(out, out_of_wide, **tolerance)


def test_rejected_tokens(device):
    """Going on from an intermediate state is never having seen the tokens behind it."""
    call = cases.StateUpdate(nheads=3, dstate=16, tokens=4, num_slots=7, intermediate_states=True)
    call = call.call(device)
    slots = torch.tensor([5, 0, 3], device=device)
    accepted = torch.tensor([1, 4, 2], device=device)
    state = call.arguments["state"].clone()
    call.invoke(state=state, state_batch_indices=slots)
    rows = torch.arange(3, device=device)
    state[slots] = call.arguments["intermediate_states"][rows, accepted - 1]
    for b, (slot, count) in enumerate(zip(slots.tolist(), accepted.tolist())):
        first = {name: call.arguments[name][b : b + 1, :count] for name in _at(call, 0)}
        expected = call.arguments["state"].clone()
        call.invoke(
            state=expected,
            state_batch_indices=slots[b : b + 1],
            intermediate_states=None,
            **first,
        )
        assert poison.same_bits(state[slot], expected[slot])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("negative", [-1, -2, -(2**31)])
@pytest.mark.parametrize("nheads", [None, 4])
def test_padding_slots(index_dtype, negative, nheads, device):
    call = cases.StateUpdate(batch=4, num_slots=6, nheads=nheads).call(device)
    before = call.arguments["state"].clone()
    indices = torch.tensor([5, negative, 0, negative], dtype=index_dtype, device=device)
    out = call.invoke(state_batch_indices=indices)["out"]
    after = call.arguments["state"]
    assert (out[[1, 3]] == 0).all() and (out[[0, 2]] != 0).any()
    assert torch.equal(after[1:5], before[1:5])
    assert not torch.equal(after[0], before[0]) and not torch.equal(after[5], before[5])


def test_nan_in_padding_rows(device):
    """A padding row is not even read: its output is 0, not NaN."""
    call = cases.StateUpdate(batch=3, num_slots=6).call(device)
    for name in ("x", "dt", "B", "C", "z"):
        call.arguments[name][1] = float("nan")
    indices = torch.tensor([4, -1, 1], dtype=torch.int32, device=device)
    out = call.invoke(state_batch_indices=indices)["out"]
    assert out.isfinite().all() and (out[1] == 0).all()
    assert call.arguments["state"].isfinite().all()


def test_nan_in_unused_slots(device):
    """Slots that no row names are neither read nor written."""
    call = cases.StateUpdate(batch=2, num_slots=6).call(device)
    call.arguments["state"][[0, 2, 3, 5]] = float("nan")
    indices = torch.tensor([4, 1], dtype=torch.int32, device=device)
    assert call.invoke(state_batch_indices=indices)["out"].isfinite().all()
    assert call.arguments["state"][[0, 2, 3, 5]].isnan().all()
    assert call.arguments["state"][[1, 4]].isfinite().all()


def test_state_as_a_view_of_a_pool(device):
    """Layers side by side in one pool: only the slots of this layer change."""
    call = cases.StateUpdate(batch=2, nheads=3, dim=5, num_slots=3).call(device)
    pool = torch.randn(3, 4, 3, 4, 5, device=device)  # slot, layer, head, state, channel
    before = pool.clone()
    indices = torch.tensor([2, 0], dtype=torch.int32, device=device)
    call.invoke(state=pool[:, 2].transpose(2, 3), state_batch_indices=indices)
    changed = pool != before
    assert changed[[0, 2], 2].all()
    changed[[0, 2], 2] = False
    assert not changed.any()


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16])
def test_output_uses_the_unrounded_state(state_dtype, device):
    call = cases.StateUpdate(dtypes={"state": state_dtype}, dstate=64, dim=8).call(device)
    narrow = call.arguments["state"].clone()
    wide = call.invoke(state=narrow.float())["out"]
    # Sums may run in another order; a rounded state would be off by 1e-3 at least.
    torch.testing.assert_close(call.invoke(state=narrow)["out"], wide, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [None, 3])
@pytest.mark.parametrize("nheads", [None, 6])
def test_properties(nheads, tokens, device):
    case = cases.StateUpdate(batch=9, nheads=nheads, dim=40, dstate=17, tokens=tokens)
    case = dataclasses.replace(case, intermediate_states=tokens is not None)
    properties.check_thread_count(case.call(device))
    properties.check_repeats(case.call(device))
    properties.check_row_position(case.call(device))


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("tied", ["head", "channel"])
def test_tied_equals_expanded_copy(dtype, tied, device):
    """One decay per head or channel is a matter of speed, not of values."""
    call = cases.StateUpdate(nheads=4, dim=16, dstate=16, tied=tied, dtype=dtype).call(device)
    tied = compare.run(call).results
    call.arena.restore()
    copied = {name: call.arguments[name].contiguous() for name in ("A", "dt", "dt_bias")}
    copy = compare.run(dataclasses.replace(call, arguments={**call.arguments, **copied})).results
    for name in tied:
        eps = torch.finfo(tied[name].dtype).eps
        scale = copy[name].abs().max().item()
        torch.testing.assert_close(tied[name], copy[name], rtol=0, atol=4 * eps * scale)


def test_nan_stays_in_its_channel(device):
    call = cases.StateUpdate(nheads=3, dim=9).call(device)
    call.arguments["x"][1, 2, 4] = float("nan")
    finite = call.invoke()["out"].isfinite()
    assert not finite[1, 2, 4]
    finite[1, 2, 4] = True
    assert finite.all()
    finite = call.arguments["state"].isfinite()
    assert not finite[1, 2, 4].any()
    finite[1, 2, 4] = True
    assert finite.all()


@pytest.mark.parametrize("dstate", [1, 4, 17, 64])
@pytest.mark.parametrize("nheads", [None, 3])
def test_infinity_stays_infinity(dstate, nheads, device):
    """An infinite input among positive numbers gives an infinite output, not NaN."""
    call = cases.StateUpdate(nheads=nheads, dim=9, dstate=dstate).call(device)
    for name in ("state", "B", "C", "D", "x", "z"):
        call.arguments[name].abs_()
    place = (1, 4) if nheads is None else (1, 2, 4)
    call.arguments["x"][place] = float("inf")
    out = call.invoke()["out"]
    assert out[place] == float("inf")
    assert (call.arguments["state"][place] == float("inf")).all()
    out[place] = 0
    assert out.isfinite().all()
