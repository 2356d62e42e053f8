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
    batch=[0, 1, 8],
    dim=[0, 1, 8, 64, 67],
    dstate=[0, 1, 2, 3, 8, 15, 16, 17, 64, 128, 300],
    num_slots=[3, 5, 40],
    D=[False],
    z=[False],
    dt_bias=[False],
    dt_softplus=[False],
    tied=["head", "channel"],
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


@pytest.mark.parametrize("nheads", [None, 6])
def test_properties(nheads, device):
    case = cases.StateUpdate(batch=9, nheads=nheads, dim=40, dstate=17)
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
