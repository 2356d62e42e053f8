"""causal_conv1d, forward and backward."""

import dataclasses

import pytest
import torch
from harness import cases, compare, oracle, poison, properties

BASE = cases.Conv()
ROWS = cases.variations(
    BASE,
    {"seqlen": 2, "width": 9, "packing": "padded"},
    {"seqlen": 70, "dim": 64, "silu": False},
    {"seqlen": 70, "dim": 64, "layout": "transposed"},
    {"seqlen": 67, "dim": 72, "layout": "transposed", "packing": "padded"},
    {"seqlen": 1030, "dim": 3, "batch": 1},
    {"seqlen": 600, "dim": 40, "batch": 1, "layout": "transposed"},
    {"seqlen": 5, "dim": 2050, "layout": "transposed"},
    {"bias": False, "initial_states": False, "silu": False},
    {"width": 1, "packing": "packed"},
    {"packing": "padded", "initial_states": False},
    {"packing": "padded", "index_dtype": torch.int64, "layout": "step2"},
    batch=[0, 1, 3],
    dim=[0, 1, 8, 33, 64, 67],
    seqlen=[0, 1, 2, 3, 4, 8, 31, 64, 65, 130],
    width=[1, 2, 3, 5, 8, 16, 33],
    bias=[False],
    silu=[False],
    initial_states=[False],
    packing=cases.PACKINGS[1:],
    layout=poison.LAYOUTS[1:],
    layouts=[{"x": "transposed"}, {"dout": "scalar"}, {"dout": "transposed"}],
    dtypes=[{"weight": torch.bfloat16}, {"bias": torch.float16}],
    only_result=["out", "final_states"],
    exact=[True],
)


def table(rows):
    return pytest.mark.parametrize("case", rows.values(), ids=rows.keys())


@table(cases.with_dtypes(ROWS))
def test_against_oracle(case, device):
    compare.check_call(case.call(device))


@pytest.mark.full
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("packing", [None, "padded"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("width", [2, 4, 7])
def test_large(dtype, packing, layout, width, device):
    case = cases.Conv(
        batch=3, dim=136, seqlen=1543, width=width, dtype=dtype, packing=packing, layout=layout
    )
    compare.check_call(case.call(device))


GRADCHECK = cases.variations(
    dataclasses.replace(BASE, dim=2, seqlen=6, width=3, dtype=torch.float64),
    {"packing": "padded", "initial_states": False},
    {"seqlen": 2, "width": 5},
    seqlen=[0, 1, 2],
    width=[1, 2, 4],
    bias=[False],
    silu=[False],
    initial_states=[False],
    packing=cases.PACKINGS[1:],
    layout=["transposed", "sliced"],
)


@table(GRADCHECK)
def test_gradcheck(case, device):
    properties.gradcheck(case.call(device))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("seqlen, dim", [(19, 5), (64, 64), (130, 16)])
def test_layout_of_results(layout, seqlen, dim, device):
    call = cases.Conv(layout=layout, seqlen=seqlen, dim=dim).call(device)
    results = call.invoke()
    assert results["out"].stride() == call.arguments["x"].stride()
    batch, dim, past = results["final_states"].shape
    assert results["final_states"].stride() == (past * dim, 1, dim)


def _split(call, cuts):
    """The call in pieces, each starting from the final states of the piece before."""
    arguments = {n: call.arguments[n] for n in ("weight", "bias", "silu")}
    x, ids = call.arguments["x"], call.arguments.get("seq_idx")
    states = call.arguments["initial_states"]
    out = []
    for begin, end in zip([0, *cuts], [*cuts, x.shape[-1]]):
        piece, states = torch.ops.mamba_ssm.causal_conv1d(
            x=x[..., begin:end],
            seq_idx=None if ids is None else ids[:, begin:end],
            initial_states=states,
            **arguments,
        )
        out.append(piece)
    return {"out": torch.cat(out, dim=-1), "final_states": states}


@dataclasses.dataclass
class _SplitCall(cases.Call):
    cuts: tuple = ()

    def invoke(self, **replaced):
        return _split(
            dataclasses.replace(self, arguments={**self.arguments, **replaced}), self.cuts
        )


@pytest.mark.parametrize("cuts", [(1,), (18,), (9,), (2, 4, 6, 8), tuple(range(1, 19)), (0, 5, 5)])
@pytest.mark.parametrize("width", [1, 3, 4, 7])
@pytest.mark.parametrize("packing", [None, "single"])
@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_any_split_equals_the_whole(cuts, width, packing, dtype, device):
    """With the state carried along, outputs and gradients are those of one call."""
    call = cases.Conv(width=width, packing=packing, dtype=dtype).call(device)
    split = _SplitCall(
        **{f.name: getattr(call, f.name) for f in dataclasses.fields(call)}, cuts=cuts
    )
    if dtype in (torch.float32, torch.float64):
        compare.check_call(split)
    else:  # gradients of states are rounded at every cut
        forward = dataclasses.replace(split, cotangents={}, differentiable=())
        compare.check_call(forward)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_split_inside_packed_sequences(dtype, packing, device):
    for seed in range(10):
        call = cases.Conv(packing=packing, dtype=dtype, seed=seed, seqlen=30).call(device)
        ids = call.arguments["seq_idx"].cpu()
        cuts = [
            t for t in range(1, 30) if (ids[:, t - 1] == ids[:, t]).all() and (ids[:, t] >= 0).all()
        ]
        if not cuts:
            continue
        compare.check_results(call, _split(call, cuts))


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("lengths", [(5, 9, 3), (1, 1, 1, 14), (17,), (2, 15)])
def test_packed_equals_separate(dtype, layout, lengths, device):
    """A packed row is its sequences side by side, the initial states before the first."""
    case = cases.Conv(batch=1, seqlen=17, dtype=dtype, layout=layout)
    call = case.call(device)
    x, states = call.arguments["x"], call.arguments["initial_states"]
    arguments = {n: call.arguments[n] for n in ("weight", "bias", "silu")}
    ids = torch.repeat_interleave(torch.tensor([5, 2, 9, 0][: len(lengths)]), torch.tensor(lengths))
    out, final = torch.ops.mamba_ssm.causal_conv1d(
        x=x, seq_idx=ids[None].int().to(device), initial_states=states, **arguments
    )
    begin = 0
    for length in lengths:
        piece, piece_final = torch.ops.mamba_ssm.causal_conv1d(
            x=x[..., begin : begin + length], initial_states=states, **arguments
        )
        tolerance = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}
        torch.testing.assert_close(out[..., begin : begin + length], piece, **tolerance)
        states = None
        begin += length
    torch.testing.assert_close(final, piece_final, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("silu", [False, True])
def test_padding_is_inert(dtype, layout, silu, device):
    """Whatever stands in padding, NaN included: no bit of anything else depends on it."""
    outcomes = []
    for filling in (0.0, 3.0, float("nan"), float("inf")):
        call = cases.Conv(
            packing="padded", dtype=dtype, layout=layout, silu=silu, seqlen=37, dim=9
        ).call(device)
        padding = (call.arguments["seq_idx"] < 0)[:, None].expand_as(call.arguments["x"])
        assert padding.any()
        call.arguments["x"][padding] = filling
        call.cotangents["out"][padding] = filling
        outcomes.append(compare.run(call))
        assert (outcomes[-1].results["out"][padding] == 0).all()
        assert (outcomes[-1].gradients["x"][padding] == 0).all()
    for other in outcomes[1:]:
        compare.check_same(call, outcomes[0], other, "depends on padding")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("t", [0, 7, 18])
def test_nan_is_causal(value, layout, t, device):
    """A bad token reaches its channel's next width-1 outputs and nothing else."""
    case = cases.Conv(layout=layout, dim=9)
    clean = compare.run(case.call(device))
    call = case.call(device)
    call.arguments["x"][1, 4, t] = value
    dirty = compare.run(call)
    reached = torch.zeros_like(clean.results["out"], dtype=torch.bool)
    reached[1, 4, t : t + 4] = True
    assert poison.same_bits(clean.results["out"][~reached], dirty.results["out"][~reached])
    reached[1, 4, max(0, t - 3) : t] = True  # their gradient passes the outputs reached
    assert poison.same_bits(clean.gradients["x"][~reached], dirty.gradients["x"][~reached])
    assert not dirty.results["out"][1, 4, t].isfinite()
    channels = torch.arange(9, device=device) != 4
    for name in ("weight", "bias"):
        first, second = clean.gradients[name], dirty.gradients[name]
        assert poison.same_bits(first[channels], second[channels])


def test_nan_stays_in_its_sequence(device):
    call = cases.Conv(batch=1, seqlen=12).call(device)
    ids = torch.tensor([[3] * 5 + [1] * 7], dtype=torch.int32, device=device)
    call.arguments["x"][0, :, 4] = float("nan")
    results = call.invoke(seq_idx=ids)
    assert results["out"][..., 5:].isfinite().all() and results["final_states"].isfinite().all()


PROPERTIES = cases.variations(
    dataclasses.replace(BASE, batch=3, dim=70, seqlen=150),
    {"packing": "padded", "layout": "transposed"},
    {"dim": 69, "seqlen": 149},  # rows start anywhere between two 16-byte boundaries
    packing=["padded"],
    layout=["transposed"],
    dtype=[torch.bfloat16, torch.float64],
    width=[7],
)


@table(PROPERTIES)
def test_threads_change_no_bit(case, device):
    properties.check_thread_count(case.call(device))


@table(PROPERTIES)
def test_row_position_changes_no_bit(case, device):
    properties.check_row_position(dataclasses.replace(case, layout="contiguous").call(device))


@table(PROPERTIES)
def test_repeats(case, device):
    properties.check_repeats(case.call(device))


@table(PROPERTIES)
def test_gradient_subsets(case, device):
    properties.check_gradient_subsets(case.call(device))


def test_scalar_gradient(device):
    """sum().backward() sends an expanded gradient of stride 0."""
    call = cases.Conv(dtype=torch.float64).call(device)
    x = call.arguments["x"].detach().requires_grad_()
    call.invoke(x=x)["out"].sum().backward()
    ones = torch.ones_like(x)
    truth = oracle.exact(call.op, call.arguments, ("x",), {"out": ones, "final_states": None})
    torch.testing.assert_close(x.grad.cpu(), truth.gradients["x"])
