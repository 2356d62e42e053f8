"""selective_scan, forward and backward."""

import dataclasses

import pytest
import torch
from harness import cases, compare, oracle, poison, properties

BASE = cases.Scan()
ROWS = cases.variations(
    BASE,
    {"B": "constant", "C": "constant"},
    {"B": "constant", "C": 3},
    {"B": 2, "C": "constant"},
    {"B": "flat", "C": "flat"},
    {"B": 2, "C": 3},
    {"B": 6, "C": 6},
    {"B": 3, "C": 3, "packing": "padded"},
    {"B": "constant", "C": "constant", "packing": "padded"},
    {"complex_A": True, "B": "constant", "C": "constant"},
    {"complex_A": True, "B": "constant"},
    {"complex_A": True, "C": "constant"},
    {"complex_A": True, "B": "flat", "C": "flat"},
    {"complex_A": True, "B": 2, "C": 2},
    {"complex_A": True, "packing": "padded", "B": 3},
    {"complex_A": True, "dstate": 17, "seqlen": 70, "layout": "transposed"},
    {"complex_A": True, "D": False, "z": False, "delta_bias": False, "delta_softplus": False},
    {"complex_A": True, "seqlen": 0},
    {"complex_A": True, "only_result": "last_state"},
    {"D": False, "z": False, "delta_bias": False, "initial_state": False},
    {"delta_bias": False, "delta_softplus": False},
    {"wide_delta": True, "seqlen": 65},
    {"wide_delta": True, "packing": "padded"},
    {"seqlen": 33, "dim": 64, "dstate": 16, "layout": "transposed"},
    {"seqlen": 70, "dim": 72, "dstate": 16, "packing": "padded"},
    {"seqlen": 300, "dim": 3, "dstate": 16},
    {"seqlen": 70, "dim": 2, "dstate": 256, "batch": 1},
    {"seqlen": 40, "dim": 2, "dstate": 257, "batch": 1},
    {"seqlen": 9, "dim": 2, "dstate": 1024, "batch": 1},
    {"seqlen": 3, "dim": 64, "dstate": 2, "batch": 512},
    {"seqlen": 33, "dim": 192, "dstate": 2, "batch": 100, "B": 2},
    {"packing": "padded", "index_dtype": torch.int64, "layout": "step2"},
    {"packing": "padded", "initial_state": False},
    {"packing": "packed", "seqlen": 65},
    batch=[0, 1, 3],
    dim=[0, 1, 8, 33, 67],
    seqlen=[0, 1, 2, 3, 31, 32, 33, 64, 65],
    dstate=[1, 2, 3, 5, 8, 15, 16, 17, 32, 64, 100],
    D=[False],
    z=[False],
    delta_bias=[False],
    delta_softplus=[False],
    initial_state=[False],
    complex_A=[True],
    packing=cases.PACKINGS[1:],
    layout=poison.LAYOUTS[1:],
    layouts=[
        {"u": "transposed"},
        {"delta": "scalar"},
        {"B": "transposed", "C": "sliced"},
        {"A": "expanded"},
        {"dout": "scalar"},
        {"dlast_state": "transposed"},
        {"z": "sliced", "D": "step2"},
    ],
    dtypes=[
        {"A": torch.bfloat16},
        {"D": torch.float16, "delta_bias": torch.bfloat16},
        {"initial_state": torch.float32},
    ],
    only_result=["out", "last_state"],
    exact=[True],
)


def table(rows):
    return pytest.mark.parametrize("case", rows.values(), ids=rows.keys())


@table(cases.with_dtypes(ROWS))
def test_against_oracle(case, device):
    compare.check_call(case.call(device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_initial_state_of_type_T(dtype, device):
    compare.check_call(cases.Scan(dtype=dtype, dtypes={"initial_state": dtype}).call(device))


@pytest.mark.full
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("packing", [None, "padded"])
@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("form", [1, 8, "constant"])
def test_large(dtype, packing, complex_A, form, device):
    case = cases.Scan(
        batch=2,
        dim=72,
        seqlen=777,
        dstate=16,
        dtype=dtype,
        packing=packing,
        complex_A=complex_A,
        B=form,
        C=form,
    )
    compare.check_call(case.call(device))


_SMALL = dataclasses.replace(BASE, dim=2, seqlen=4, dstate=2, dtype=torch.float64)
GRADCHECK = cases.variations(
    _SMALL,
    {"B": "constant", "C": "constant"},
    {"B": "flat", "C": "flat"},
    {"B": 2, "C": 2},
    {"B": "constant", "packing": "padded"},
    {"complex_A": True, "B": "constant", "C": "constant"},
    {"complex_A": True, "C": "constant", "packing": "padded"},
    {"complex_A": True, "B": 2, "C": 2, "initial_state": False},
    {"complex_A": True, "z": False},
    {"D": False, "z": False, "delta_bias": False, "delta_softplus": False, "initial_state": False},
    seqlen=[0, 1, 9],
    dstate=[1, 3],
    D=[False],
    z=[False],
    delta_bias=[False],
    delta_softplus=[False],
    initial_state=[False],
    complex_A=[True],
    packing=cases.PACKINGS[1:],
    layout=["transposed", "sliced"],
)


@table(GRADCHECK)
def test_gradcheck(case, device):
    properties.gradcheck(case.call(device))


GRADCHECK_FAST = cases.variations(
    dataclasses.replace(BASE, dim=4, dstate=5, dtype=torch.float64),
    {"dstate": 300, "seqlen": 3},
    {"complex_A": True, "seqlen": 33},
    {"seqlen": 70, "packing": "padded"},
    seqlen=[31, 32, 33, 65, 100],
    B=[2, 4, "constant"],
)


@table(GRADCHECK_FAST)
def test_gradcheck_along_random_directions(case, device):
    properties.gradcheck(case.call(device), fast_mode=True)


def _split(call, cuts):
    """The call in pieces, each starting from the last state of the piece before."""
    arguments = dict(call.arguments)
    seqlen = arguments["u"].shape[-1]
    pair = 2 if arguments["A"].is_complex() else 1
    state, out = arguments.pop("initial_state", None), []
    for begin, end in zip([0, *cuts], [*cuts, seqlen]):
        piece = dict(arguments)
        for name in ("u", "delta", "z", "seq_idx", "B", "C"):
            value = arguments.get(name)
            if value is None or (name in ("B", "C") and value.dim() == 2):
                continue
            width = pair if name in ("B", "C") else 1
            piece[name] = value[..., begin * width : end * width]
        y, state = torch.ops.mamba_ssm.selective_scan(**piece, initial_state=state)
        out.append(y)
    return {"out": torch.cat(out, dim=-1), "last_state": state}


@dataclasses.dataclass
class _SplitCall(cases.Call):
    cuts: tuple = ()

    def invoke(self, **replaced):
        return _split(
            dataclasses.replace(self, arguments={**self.arguments, **replaced}), self.cuts
        )


@pytest.mark.parametrize("cuts", [(1,), (36,), (32,), (5, 9, 33), tuple(range(1, 37)), (0, 5, 5)])
@pytest.mark.parametrize("form", [2, "constant"])
@pytest.mark.parametrize("packing", [None, "single"])
@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_any_split_equals_the_whole(cuts, form, packing, complex_A, dtype, device):
    """With the state carried along, outputs and gradients are those of one call."""
    call = cases.Scan(
        seqlen=37, packing=packing, B=form, C=form, complex_A=complex_A, dtype=dtype
    ).call(device)
    split = _SplitCall(
        **{f.name: getattr(call, f.name) for f in dataclasses.fields(call)}, cuts=cuts
    )
    if dtype in (torch.float16, torch.bfloat16):  # gradients of B and C are rounded in every piece
        split = dataclasses.replace(split, cotangents={}, differentiable=())
    compare.check_call(split)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_split_inside_packed_sequences(dtype, packing, device):
    for seed in range(10):
        call = cases.Scan(packing=packing, dtype=dtype, seed=seed, seqlen=30).call(device)
        ids = call.arguments["seq_idx"].cpu()
        cuts = [
            t for t in range(1, 30) if (ids[:, t - 1] == ids[:, t]).all() and (ids[:, t] >= 0).all()
        ]
        if not cuts:
            continue
        compare.check_results(call, _split(call, cuts))


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("lengths", [(5, 9, 3), (1, 1, 1, 14), (17,), (2, 15)])
@pytest.mark.parametrize("form", [1, "constant"])
def test_packed_equals_separate(dtype, lengths, form, device):
    """A packed row is its sequences side by side, the initial state before the first."""
    call = cases.Scan(batch=1, seqlen=17, dtype=dtype, B=form, C=form).call(device)
    ids = torch.repeat_interleave(torch.tensor([5, 2, 9, 0][: len(lengths)]), torch.tensor(lengths))
    packed = call.invoke(seq_idx=ids[None].int().to(device))
    begin, state = 0, call.arguments["initial_state"]
    for length in lengths:
        piece = dict(call.arguments, initial_state=state)
        for name in ("u", "delta", "z", *(("B", "C") if form == 1 else ())):
            piece[name] = piece[name][..., begin : begin + length]
        out, last = torch.ops.mamba_ssm.selective_scan(**piece)
        tolerance = {"rtol": 0, "atol": 32 * torch.finfo(dtype).eps}
        torch.testing.assert_close(packed["out"][..., begin : begin + length], out, **tolerance)
        state = None
        begin += length
    tolerance = {"rtol": 0, "atol": 32 * torch.finfo(last.dtype).eps}
    torch.testing.assert_close(packed["last_state"], last, **tolerance)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("form", [1, "constant"])
def test_padding_is_inert(dtype, complex_A, form, device):
    """Whatever stands in padding, NaN included: no bit of anything else depends on it."""
    outcomes = []
    for filling in (0.0, 3.0, float("nan"), float("inf")):
        call = cases.Scan(
            packing="padded", dtype=dtype, complex_A=complex_A, seqlen=67, B=form, C=form
        ).call(device)
        padding = call.arguments["seq_idx"] < 0
        assert padding.any()
        for name in ("u", "delta", "z"):
            values = call.arguments[name]
            values[padding[:, None].expand_as(values)] = filling
        if form == 1:
            for name in ("B", "C"):
                values = call.arguments[name]
                columns = padding.repeat_interleave(2, dim=1) if complex_A else padding
                values[columns[:, None, None].expand_as(values)] = filling
        out_padding = padding[:, None].expand_as(call.cotangents["out"])
        call.cotangents["out"][out_padding] = filling
        outcomes.append(compare.run(call))
        assert (outcomes[-1].results["out"][out_padding] == 0).all()
        for name in ("u", "delta", "z"):
            assert (outcomes[-1].gradients[name][out_padding] == 0).all()
    for other in outcomes[1:]:
        compare.check_same(call, outcomes[0], other, "depends on padding")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["u", "delta", "z", "B", "C"])
@pytest.mark.parametrize("t", [0, 20, 33, 44])
def test_nan_is_causal(value, name, t, device):
    """A bad token leaves earlier outputs, other rows and other channels or groups alone."""
    case = cases.Scan(dim=8, seqlen=45, B=2, C=2, dstate=5)
    clean = compare.run(case.call(device)).results
    call = case.call(device)
    if name in ("B", "C"):
        call.arguments[name][1, 1, 2, t] = value
        channels = slice(4, 8)
    else:
        call.arguments[name][1, 3, t] = value
        channels = slice(3, 4)
    dirty = call.invoke()
    hit = torch.zeros(2, 8, 45, dtype=torch.bool, device=device)
    hit[1, channels, t : t + 1 if name in ("z", "C") else None] = True
    assert poison.same_bits(clean["out"][0], dirty["out"][0])
    tolerance = {"rtol": 1e-5, "atol": 1e-6}  # neighbours may take another path to the same values
    torch.testing.assert_close(clean["out"][~hit], dirty["out"][~hit], **tolerance)
    if name in ("z", "C"):
        torch.testing.assert_close(clean["last_state"], dirty["last_state"], **tolerance)
    if value != value:
        assert dirty["out"][hit].isnan().all()


@pytest.mark.parametrize("dim, dstate", [(8, 4), (3, 17), (33, 1)])
def test_infinity_stays_infinity(dim, dstate, device):
    """An infinite input among positive numbers gives infinite outputs from there on, not NaN."""
    call = cases.Scan(dim=dim, dstate=dstate, seqlen=40).call(device)
    for name in ("u", "B", "C", "D", "z", "initial_state"):
        call.arguments[name].abs_()
    call.arguments["u"][1, 2, 20] = float("inf")
    out = call.invoke()["out"]
    assert (out[1, 2, 20:] == float("inf")).all()
    out[1, 2, 20:] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["delta", "z"])
def test_nan_has_a_nan_gradient(name, device):
    """Where an argument is NaN and acts through a curve, so is its gradient."""
    call = cases.Scan(dim=8, seqlen=45).call(device)
    call.arguments[name][1, 3, 20] = float("nan")
    assert compare.run(call).gradients[name][1, 3, 20].isnan()


@pytest.mark.parametrize("name", ["u", "delta", "B"])
def test_nan_gradients_stay_in_their_rows(name, device):
    case = cases.Scan(dim=8, seqlen=45, B=2, C=2, batch=3)
    clean = compare.run(case.call(device)).gradients
    call = case.call(device)
    call.arguments[name][(1, 1, 2, 20) if name == "B" else (1, 3, 20)] = float("nan")
    dirty = compare.run(call).gradients
    for argument in ("u", "delta", "z", "B", "C", "initial_state"):
        for row in (0, 2):
            assert poison.same_bits(clean[argument][row], dirty[argument][row]), argument
    others = [0, 1, 2] if name == "B" else [0, 1, 2, 4, 5, 6, 7]
    for argument in ("A", "D", "delta_bias"):
        first, second = clean[argument][others], dirty[argument][others]
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_nan_stays_in_its_sequence(device):
    call = cases.Scan(batch=1, seqlen=12).call(device)
    ids = torch.tensor([[3] * 5 + [1] * 7], dtype=torch.int32, device=device)
    for name in ("u", "delta", "B"):
        call.arguments[name][..., 4] = float("nan")
    results = call.invoke(seq_idx=ids)
    assert results["out"][..., 5:].isfinite().all() and results["last_state"].isfinite().all()


PROPERTIES = cases.variations(
    dataclasses.replace(BASE, batch=3, dim=66, seqlen=150, dstate=16),
    {"complex_A": True, "dstate": 5},
    {"B": "constant", "C": "constant"},
    {"B": 3, "C": 3, "packing": "padded"},
    packing=["padded"],
    layout=["transposed"],
    dtype=[torch.bfloat16, torch.float64],
)


@table(PROPERTIES)
def test_threads_change_no_bit(case, device):
    properties.check_thread_count(case.call(device))


@table(PROPERTIES)
def test_row_position_changes_no_bit(case, device):
    properties.check_row_position(dataclasses.replace(case, layout="contiguous").call(device))


@table(PROPERTIES)
def test_repeats(case, device):
    properties.check_repeats(case.call(device), count=5)


@table(PROPERTIES)
def test_gradient_subsets(case, device):
    properties.check_gradient_subsets(dataclasses.replace(case, dim=9, seqlen=40).call(device))


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize(
    "low, high", [(19.9, 20.1), (20, 90), (-20, -15), (-104, -80), (-1e4, -500)]
)
def test_softplus_far_out(dtype, low, high, device):
    """Around the threshold, where exp(-x) is all that is left, and where it is less than that."""
    case = cases.Scan(dtype=dtype, delta_bias=False, initial_state=False, seqlen=9)
    call = case.call(device)
    delta = call.arguments["delta"]
    delta.copy_(torch.linspace(low, high, delta.numel(), device=device).reshape(delta.shape))
    call.arguments["A"].mul_(0.01)
    call.arena = poison.Arena(device)  # the values differ from those that it placed
    compare.check_call(call, rerun=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("low, high", [(-60, -30), (-80, -70)])
def test_softplus_keeps_relative_accuracy(dtype, low, high, device):
    """log1p(exp(x)) is exp(x) there, not 0: the output keeps its digits."""
    call = cases.Scan(
        dtype=dtype, delta_bias=False, initial_state=False, D=False, z=False, seqlen=1, dstate=1
    ).call(device)
    delta = call.arguments["delta"]
    delta.copy_(torch.linspace(low, high, delta.numel(), device=device).reshape(delta.shape))
    truth = oracle.exact(call.op, call.arguments).results["out"]
    out = call.invoke()["out"].cpu().double()
    assert ((out - truth).abs() <= 32 * torch.finfo(dtype).eps * truth.abs()).all()


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("seqlen", [0, 1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("packing", [None, "padded"])
def test_states_for_the_backward(dtype, seqlen, packing, device):
    """selective_scan_fwd keeps the state before every 32nd token."""
    call = cases.Scan(dtype=dtype, seqlen=seqlen, packing=packing).call(device)
    out, last_state, states = torch.ops.mamba_ssm.selective_scan_fwd(**call.arguments)
    plain = call.invoke()
    assert poison.same_bits(out, plain["out"])
    assert poison.same_bits(last_state, plain["last_state"])
    chunks = (seqlen + 31) // 32
    assert states.shape == (2, chunks, 6, 4) and states.dtype == last_state.dtype
    for chunk in range(1, chunks):
        piece = dict(call.arguments)
        for name in ("u", "delta", "z", "B", "C", "seq_idx"):
            if name in piece:
                piece[name] = piece[name][..., : 32 * chunk]
        truth = oracle.exact(call.op, piece).results["last_state"]
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(states[:, chunk].cpu().double(), truth, **tolerance)


def test_last_state_is_its_own_tensor(device):
    """It keeps no larger buffer alive."""
    last_state = cases.Scan(seqlen=300).call(device).invoke()["last_state"]
    assert last_state.untyped_storage().nbytes() == last_state.numel() * last_state.element_size()


def test_layout_of_out(device):
    for layout in ("contiguous", "transposed"):
        call = cases.Scan(layout=layout).call(device)
        assert call.invoke()["out"].shape == call.arguments["u"].shape


def test_no_states(device):
    """dstate 0 leaves D u: computed, or refused in words."""
    call = cases.Scan(dstate=0).call(device)
    try:
        compare.check_call(call)
    except RuntimeError as error:
        assert "dstate" in str(error), error


def test_scalar_gradient(device):
    """sum().backward() sends an expanded gradient of stride 0."""
    call = cases.Scan(dtype=torch.float64).call(device)
    u = call.arguments["u"].detach().requires_grad_()
    call.invoke(u=u)["out"].sum().backward()
    ones = torch.ones_like(u)
    truth = oracle.exact(call.op, call.arguments, ("u",), {"out": ones, "last_state": None})
    torch.testing.assert_close(u.grad.cpu(), truth.gradients["u"])
