"""ssd_chunk_scan, forward and backward, and mamba_chunk_scan_combined over it."""

import dataclasses

import pytest
import torch
from harness import cases, compare, oracle, poison, properties
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

INF = float("inf")
BASE = cases.Ssd()
CUT = dataclasses.replace(BASE, batch=1, num_sequences=4)
ROWS = cases.variations(
    BASE,
    {"D": None, "z": False, "dt_bias": False, "initial_states": False},
    {"dt_bias": False, "dt_softplus": False},
    {"limits": True, "dt_softplus": False},
    {"wide_dt": True, "seqlen": 65},
    {"wide_dt": True, "packing": "padded"},
    {"nheads": 1, "ngroups": 1},
    {"nheads": 6, "ngroups": 3},
    {"nheads": 3, "ngroups": 3},
    {"headdim": 64, "dstate": 128, "seqlen": 65, "nheads": 2},
    {"headdim": 80, "dstate": 37, "seqlen": 63, "nheads": 2},
    {"headdim": 64, "dstate": 16, "seqlen": 200, "nheads": 2, "ngroups": 1},
    {"headdim": 1, "dstate": 1, "seqlen": 200},
    {"headdim": 129, "dstate": 130, "seqlen": 9, "nheads": 2},
    {"headdim": 3, "dstate": 300, "seqlen": 9, "nheads": 2},
    {"batch": 64, "seqlen": 3, "nheads": 8},
    {"projection": True, "dtypes": {}, "headdim": 64, "seqlen": 65},
    {"projection": True, "packing": "padded", "D": "channel"},
    {"packing": "padded", "index_dtype": torch.int64, "layout": "step2"},
    {"packing": "padded", "initial_states": False},
    {"packing": "padded", "seqlen": 200},
    {"packing": "packed", "seqlen": 65},
    {"packing": "blank", "seqlen": 64, "limits": True},
    {"batch": 1, "num_sequences": 1},
    {"batch": 1, "num_sequences": 4},
    {"batch": 1, "num_sequences": 4, "index_dtype": torch.int64, "layout": "step2"},
    {"batch": 1, "num_sequences": 4, "initial_states": "first"},
    {"batch": 1, "num_sequences": 4, "initial_states": False},
    {"batch": 1, "num_sequences": 4, "packing": "packed"},
    {"batch": 1, "num_sequences": 4, "packing": "padded", "seqlen": 65},
    {"batch": 1, "num_sequences": 4, "packing": "blank", "initial_states": "first"},
    {"batch": 1, "num_sequences": 9, "seqlen": 200, "limits": True},
    {"batch": 1, "num_sequences": 9, "seqlen": 3},
    {"batch": 1, "num_sequences": 2, "seqlen": 0},
    {"batch": 1, "num_sequences": 0, "seqlen": 0},
    batch=[0, 1, 3],
    seqlen=[0, 1, 2, 15, 16, 17, 63, 64, 65, 200],
    headdim=[0, 1, 8, 16, 33, 64, 80],
    dstate=[1, 2, 3, 8, 15, 16, 17, 37, 64, 128],
    ngroups=[1, 4],
    D=[None, "channel"],
    z=[False],
    dt_bias=[False],
    dt_softplus=[False],
    limits=[True],
    initial_states=[False],
    packing=cases.PACKINGS[1:],
    projection=[True],
    layout=poison.LAYOUTS[1:],
    layouts=[
        {"x": "transposed"},
        {"dt": "scalar"},
        {"B": "transposed", "C": "sliced"},
        {"A": "expanded"},
        {"dout": "scalar"},
        {"dfinal_states": "transposed"},
        {"z": "sliced", "D": "step2"},
    ],
    dtypes=[
        {"A": torch.bfloat16},
        {"D": torch.float16, "dt_bias": torch.bfloat16},
        {"dt": torch.float32},
        {"dt": torch.float32, "initial_states": torch.float32},
    ],
    only_result=["out", "final_states"],
    exact=[True],
)


def table(rows):
    return pytest.mark.parametrize("case", rows.values(), ids=rows.keys())


@table(cases.with_dtypes(ROWS))
def test_against_oracle(case, device):
    compare.check_call(case.call(device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_initial_states_of_type_T(dtype, device):
    compare.check_call(cases.Ssd(dtype=dtype, dtypes={"initial_states": dtype}).call(device))


@pytest.mark.full
@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("packing", [None, "padded"])
@pytest.mark.parametrize("num_sequences", [None, 5])
def test_large(dtype, packing, num_sequences, device):
    case = cases.Ssd(
        batch=2 if num_sequences is None else 1,
        seqlen=777,
        nheads=4,
        headdim=64,
        dstate=128,
        dtype=dtype,
        packing=packing,
        num_sequences=num_sequences,
    )
    compare.check_call(case.call(device))


_SMALL = dataclasses.replace(BASE, nheads=2, headdim=2, seqlen=4, dstate=2, dtype=torch.float64)
GRADCHECK = cases.variations(
    _SMALL,
    {"D": None, "z": False, "dt_bias": False, "dt_softplus": False, "initial_states": False},
    {"limits": True, "dt_softplus": False},
    {"batch": 1, "num_sequences": 3},
    {"batch": 1, "num_sequences": 3, "initial_states": "first"},
    {"batch": 1, "num_sequences": 3, "packing": "padded"},
    seqlen=[0, 1, 9],
    dstate=[1, 3],
    headdim=[1, 3],
    ngroups=[1],
    D=[None, "channel"],
    z=[False],
    dt_bias=[False],
    dt_softplus=[False],
    limits=[True],
    initial_states=[False],
    packing=cases.PACKINGS[1:],
    projection=[True],
    layout=["transposed", "sliced"],
)


@table(GRADCHECK)
def test_gradcheck(case, device):
    properties.gradcheck(case.call(device))


GRADCHECK_FAST = cases.variations(
    dataclasses.replace(BASE, headdim=4, dstate=5, dtype=torch.float64),
    {"headdim": 64, "dstate": 128, "seqlen": 3},
    {"seqlen": 70, "packing": "padded"},
    {"seqlen": 70, "batch": 1, "num_sequences": 5},
    seqlen=[63, 64, 65, 130],
    ngroups=[1, 4],
)


@table(GRADCHECK_FAST)
def test_gradcheck_along_random_directions(case, device):
    properties.gradcheck(case.call(device), fast_mode=True)


# States ------------------------------------------------------------------------------------------

PER_TOKEN = ("x", "dt", "B", "C", "z", "seq_idx")


def tokens(arguments, begin, end):
    """The call on the tokens [begin, end)."""
    return {n: v[:, begin:end] if n in PER_TOKEN else v for n, v in arguments.items()}


def scan(**arguments):
    return torch.ops.mamba_ssm.ssd_chunk_scan(**arguments)


def split(arguments, cuts):
    """The call in pieces, each starting from the final states of the piece before."""
    arguments = dict(arguments)
    states, out = arguments.pop("initial_states", None), []
    seqlen = arguments["x"].shape[1]
    for begin, end in zip([0, *cuts], [*cuts, seqlen]):
        y, states = scan(**tokens(arguments, begin, end), initial_states=states)
        out.append(y)
    return {"out": torch.cat(out, dim=1), "final_states": states}


@dataclasses.dataclass
class _SplitCall(cases.Call):
    cuts: tuple = ()

    def invoke(self, **replaced):
        return split({**self.arguments, **replaced}, self.cuts)


@pytest.mark.parametrize("cuts", [(1,), (64,), (32,), (5, 9, 65), tuple(range(1, 70)), (0, 5, 5)])
@pytest.mark.parametrize("packing", [None, "single"])
@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_any_split_equals_the_whole(cuts, packing, dtype, device):
    """With the states carried along, outputs and gradients are those of one call."""
    call = cases.Ssd(seqlen=70, packing=packing, dtype=dtype).call(device)
    fields = {f.name: getattr(call, f.name) for f in dataclasses.fields(call)}
    pieces = _SplitCall(**fields, cuts=cuts)
    if dtype in (torch.float16, torch.bfloat16):  # gradients are rounded in every piece
        pieces = dataclasses.replace(pieces, cotangents={}, differentiable=())
    compare.check_call(pieces)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_split_inside_packed_sequences(dtype, packing, device):
    for seed in range(10):
        call = cases.Ssd(packing=packing, dtype=dtype, seed=seed, seqlen=30).call(device)
        ids = call.arguments["seq_idx"].cpu()
        cuts = [
            t for t in range(1, 30) if (ids[:, t - 1] == ids[:, t]).all() and (ids[:, t] >= 0).all()
        ]
        if cuts:
            compare.check_results(call, split(call.arguments, cuts), terms=30)


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("D", ["head", "channel"])
def test_step_by_step(dtype, softplus, D, device):
    """A scan is its tokens one by one through selective_state_update."""
    call = cases.Ssd(dtype=dtype, dt_softplus=softplus, D=D).call(device)
    a = call.arguments
    if not softplus:
        a["dt"].abs_()  # the step has no limits
        a["dt_bias"].abs_()
    heads = a["initial_states"].shape[1:]
    state = a["initial_states"].clone()

    def per_head(M):  # one number per head for the whole head
        return M[..., None].expand(*M.shape, heads[1])

    out = [
        selective_state_update(
            state,
            a["x"][:, t],
            per_head(a["dt"][:, t]),
            a["A"][:, None, None].expand(heads),
            a["B"][:, t],
            a["C"][:, t],
            a["D"] if D == "channel" else per_head(a["D"]),
            a["z"][:, t],
            per_head(a["dt_bias"]),
            softplus,
        )
        for t in range(a["x"].shape[1])
    ]
    expected = call.invoke()
    loose = torch.finfo(dtype).eps * 32
    torch.testing.assert_close(torch.stack(out, dim=1), expected["out"], rtol=loose, atol=loose)
    loose = compare.states_eps(dtype, device) * 32
    torch.testing.assert_close(state, expected["final_states"], rtol=loose, atol=loose)


@pytest.mark.parametrize("lengths", [(5, 9, 56), (1, 1, 1, 67), (70,), (64, 0, 6), (0, 3, 67, 0)])
@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_packed_equals_separate(lengths, dtype, device):
    """cu_seqlens, seq_idx, both, and a loop over the sequences: one result."""
    case = cases.Ssd(batch=1, seqlen=70, dtype=dtype, num_sequences=len(lengths))
    a = dict(case.call(device).arguments)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    names = torch.tensor([5, 2, 9, 0, 7])[: len(lengths)]
    ids = torch.repeat_interleave(names, torch.tensor(lengths))[None].int().to(device)
    a["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
    states = a["initial_states"]
    cut_out, cut_states = scan(**a)

    both_out, both_states = scan(**a, seq_idx=ids)  # ids that say nothing new
    tolerance = {"rtol": 0, "atol": 64 * torch.finfo(dtype).eps}
    exact = {"rtol": 0, "atol": 64 * compare.states_eps(dtype, device)}
    torch.testing.assert_close(both_out, cut_out, **tolerance)
    torch.testing.assert_close(both_states, cut_states, **exact)

    whole = {n: v for n, v in a.items() if n not in ("cu_seqlens", "initial_states")}
    for i, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        out, final = scan(**tokens(whole, begin, end), initial_states=states[i : i + 1])
        torch.testing.assert_close(cut_out[:, begin:end], out, **tolerance)
        torch.testing.assert_close(cut_states[i : i + 1], final, **exact)

    filled = [i for i, length in enumerate(lengths) if length]
    only = torch.zeros_like(states)  # what a row packed by seq_idx can say: one initial state
    only[filled[0]] = states[filled[0]]
    cut_out, cut_states = scan(**{**a, "initial_states": only})
    idx_out, idx_states = scan(**whole, seq_idx=ids, initial_states=only[filled[0]][None])
    torch.testing.assert_close(idx_out, cut_out, **tolerance)
    torch.testing.assert_close(idx_states[0], cut_states[filled[-1]], **exact)


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_a_sequence_has_its_initial_state_whatever_the_ids(dtype, device):
    """With cu_seqlens and seq_idx: an id that changes at a boundary resets nothing."""
    for seed in range(8):
        call = cases.Ssd(
            batch=1, seqlen=30, num_sequences=4, packing="padded", dtype=dtype, seed=seed
        ).call(device)
        whole, a = call.invoke(), dict(call.arguments)
        bounds, states = a.pop("cu_seqlens").tolist(), a.pop("initial_states")
        for i, (begin, end) in enumerate(zip(bounds, bounds[1:])):
            out, final = scan(**tokens(a, begin, end), initial_states=states[i : i + 1])
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(whole["out"][:, begin:end], out, rtol=0, atol=64 * eps)
            eps = torch.finfo(final.dtype).eps
            torch.testing.assert_close(
                whole["final_states"][i : i + 1], final, rtol=0, atol=64 * eps
            )


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("num_sequences", [None, 3])
def test_padding_is_inert(dtype, num_sequences, device):
    """Whatever stands in padding, NaN included: no bit of anything else depends on it."""
    outcomes = []
    for filling in (0.0, 3.0, float("nan"), INF):
        call = cases.Ssd(
            packing="padded",
            dtype=dtype,
            seqlen=67,
            batch=2 if num_sequences is None else 1,
            num_sequences=num_sequences,
        ).call(device)
        padding = call.arguments["seq_idx"] < 0
        assert padding.any()
        for name in ("x", "dt", "B", "C", "z"):
            call.arguments[name][padding] = filling
        call.cotangents["out"][padding] = filling
        outcomes.append(compare.run(call))
        assert (outcomes[-1].results["out"][padding] == 0).all()
        for name in ("x", "dt", "B", "C", "z"):
            assert (outcomes[-1].gradients[name][padding] == 0).all(), name
    for other in outcomes[1:]:
        compare.check_same(call, outcomes[0], other, "depends on padding")


# Numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), INF])
@pytest.mark.parametrize("name", ["x", "dt", "z", "B", "C"])
@pytest.mark.parametrize("t", [0, 20, 260, 299])
def test_nan_is_causal(value, name, t, device):
    """A bad token leaves other rows, other heads or groups, and all before its chunk alone."""
    case = cases.Ssd(seqlen=300)
    clean = case.call(device).invoke()
    call = case.call(device)
    heads = slice(2, 4) if name in ("B", "C") else slice(3, 4)
    call.arguments[name][1, t, 1 if name in ("B", "C") else 3] = value
    dirty = call.invoke()
    hit = torch.zeros(2, 300, 4, dtype=torch.bool, device=device)
    hit[1, t : t + 1 if name in ("z", "C") else None, heads] = True
    near = hit.clone()  # products within a chunk of at most 256 tokens, of which some count as 0
    near[1, max(0, t - 255) : t, heads] = True
    tolerance = {"rtol": 1e-5, "atol": 1e-5}  # neighbours may take another path to the same values
    assert poison.same_bits(clean["out"][0], dirty["out"][0])
    torch.testing.assert_close(clean["out"][~near], dirty["out"][~near], **tolerance)
    if name in ("z", "C"):
        torch.testing.assert_close(clean["final_states"], dirty["final_states"], **tolerance)
    if value != value:  # it is never hidden, either
        assert dirty["out"][hit].isnan().all()


@pytest.mark.parametrize("limits", [False, True])
@pytest.mark.parametrize("name", ["dt", "z"])
def test_nan_has_a_nan_gradient(name, limits, device):
    """Where an argument is NaN and acts through a curve, so is its gradient: none is hidden."""
    call = cases.Ssd(seqlen=45, limits=limits).call(device)
    call.arguments[name][1, 20, 3] = float("nan")
    outcome = compare.run(call)
    assert outcome.results["out"][1, 20, 3].isnan().all()
    assert outcome.gradients[name][1, 20, 3].isnan().all()


def test_nan_stays_in_its_sequence(device):
    call = cases.Ssd(batch=1, seqlen=70, initial_states=False).call(device)
    for name in ("x", "dt", "B"):
        call.arguments[name][:, 4] = float("nan")
    ids = torch.tensor([[3] * 5 + [1] * 65], dtype=torch.int32, device=device)
    bounds = torch.tensor([0, 5, 70], dtype=torch.int32, device=device)
    for packing in ({"seq_idx": ids}, {"cu_seqlens": bounds}):
        results = call.invoke(**packing)
        assert results["out"][:, 5:].isfinite().all()
        assert results["final_states"][-1].isfinite().all()


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize(
    "low, high", [(19.9, 20.1), (20, 90), (-20, -15), (-87, -80), (-1e4, -500)]
)
def test_softplus_far_out(dtype, low, high, device):
    case = cases.Ssd(dtype=dtype, dt_bias=False, initial_states=False, seqlen=9)
    call = case.call(device)
    dt = call.arguments["dt"]
    dt.copy_(torch.linspace(low, high, dt.numel(), device=device).reshape(dt.shape))
    call.arguments["A"].mul_(0.01)
    call.arena = poison.Arena(device)  # the values differ from those that it placed
    compare.check_call(call, rerun=False)


@pytest.mark.parametrize("limits", [(0.0, None), (0.0, INF), (-INF, INF), (0.25, 0.25), (0, 0)])
@pytest.mark.parametrize("softplus", [False, True])
def test_limits_of_the_step(limits, softplus, device):
    """None is no upper limit; equal limits are a constant step; outside them ddt is 0."""
    call = cases.Ssd(dt_softplus=softplus, dtype=torch.float64).call(device)
    call.arguments |= dict(zip(("dt_min", "dt_max"), limits))
    outcome = compare.check_call(call)
    if limits[0] == limits[1]:
        assert (outcome.gradients["dt"] == 0).all() and (outcome.gradients["dt_bias"] == 0).all()


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_strong_decay(scale, device):
    """exp of a long sum of large negative numbers: 0, never NaN, and no loss for what stays."""
    call = cases.Ssd(seqlen=200, headdim=16, dstate=16).call(device)
    call.arguments["A"].mul_(scale)
    call.arena = poison.Arena(device)
    compare.check_call(call, rerun=False)


# Bits --------------------------------------------------------------------------------------------

PROPERTIES = cases.variations(
    dataclasses.replace(BASE, batch=3, seqlen=150, headdim=16, dstate=16),
    {"dtype": torch.bfloat16, "headdim": 64, "dstate": 64, "nheads": 2},
    packing=["padded"],
    layout=["transposed"],
    projection=[True],
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
    properties.check_gradient_subsets(dataclasses.replace(case, seqlen=40).call(device))


def test_results_are_their_own_tensors(device):
    """Contiguous, and no larger buffer stays alive behind them."""
    for case in (cases.Ssd(seqlen=300), cases.Ssd(projection=True), cases.Ssd(layout="transposed")):
        for result in case.call(device).invoke().values():
            assert result.is_contiguous()
            assert result.untyped_storage().nbytes() == result.numel() * result.element_size()


def test_no_states(device):
    """dstate 0 leaves D x: computed, or refused in words."""
    with pytest.raises(RuntimeError, match="dstate"):
        cases.Ssd(dstate=0).call(device).invoke()


def test_scalar_gradient(device):
    """sum().backward() sends an expanded gradient of stride 0."""
    call = cases.Ssd(dtype=torch.float64).call(device)
    x = call.arguments["x"].detach().requires_grad_()
    call.invoke(x=x)["out"].sum().backward()
    ones = torch.ones_like(x)
    truth = oracle.exact(call.op, call.arguments, ("x",), {"out": ones, "final_states": None})
    torch.testing.assert_close(x.grad.cpu(), truth.gradients["x"])


# mamba_chunk_scan_combined -----------------------------------------------------------------------


def combined(a, chunk_size=64, **options):
    a = dict(a)
    limit = a.pop("dt_min", 0.0), a.pop("dt_max", INF)
    return mamba_chunk_scan_combined(chunk_size=chunk_size, dt_limit=limit, **a, **options)


def test_forms_of_the_result(device):
    call = cases.Ssd(batch=1, num_sequences=3).call(device)
    expected = call.invoke()
    out, states = expected["out"], expected["final_states"]
    assert torch.equal(combined(call.arguments), out)
    for final, varlen in ((True, False), (False, True), (True, True)):
        results = combined(call.arguments, return_final_states=final, return_varlen_states=varlen)
        assert isinstance(results, tuple) and torch.equal(results[0], out)
        assert len(results) == 1 + final + varlen
        if final:
            assert results[1].shape == (1, *states.shape[1:]) and results[1].dtype == torch.float32
        if varlen:
            assert torch.equal(results[-1], states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_of_the_states(dtype, device):
    """final_states are float32; varlen_states have state_dtype, or the dtype of C."""
    a = cases.Ssd(batch=1, num_sequences=3, dtype=dtype).call(device).arguments
    for state_dtype in (None, torch.float32, torch.float16):
        _, final, varlen = combined(
            a, return_final_states=True, return_varlen_states=True, state_dtype=state_dtype
        )
        assert final.dtype == torch.float32 and varlen.dtype == (state_dtype or dtype)


@pytest.mark.parametrize(
    "bounds", [(0, 5, 19), (0, 19, 19), (0, 0, 19), (0, 5, 19, 19, 19), (0, 19)]
)
def test_final_state_of_a_packed_row(bounds, device):
    """It is that of the last sequence with tokens, and has its gradient."""
    call = cases.Ssd(batch=1, num_sequences=len(bounds) - 1).call(device)
    a = call.arguments | {"cu_seqlens": torch.tensor(bounds, device=device)}
    x = a["x"].detach().requires_grad_()
    last = max(i for i, (s, e) in enumerate(zip(bounds, bounds[1:])) if e > s)
    _, final, varlen = combined(a | {"x": x}, return_final_states=True, return_varlen_states=True)
    assert torch.equal(final[0], varlen[last])
    (dx,) = torch.autograd.grad(final.sum(), x)
    assert (dx[:, bounds[last] :].abs().sum() > 0) and (dx[:, : bounds[last]] == 0).all()


def test_final_state_of_an_empty_row(device):
    a = cases.Ssd(batch=1, seqlen=0, num_sequences=2, initial_states="first").call(device).arguments
    _, final = combined(a, return_final_states=True)
    assert torch.equal(final, a["initial_states"])
    a = cases.Ssd(batch=1, seqlen=0, num_sequences=0, initial_states=False).call(device).arguments
    _, final = combined(a, return_final_states=True)
    assert final.shape == (1, 4, 5, 4) and (final == 0).all()


@pytest.mark.parametrize("chunk_size", [1, 3, 64, 256, 10**6])
def test_chunk_size_changes_no_bit(chunk_size, device):
    call = cases.Ssd(seqlen=70).call(device)
    out, final = combined(call.arguments, chunk_size, return_final_states=True)
    expected = call.invoke()
    assert poison.same_bits(out, expected["out"])
    assert poison.same_bits(final, expected["final_states"])


def test_combined_refuses(device):
    a = cases.Ssd().call(device).arguments
    for chunk_size in (0, -1):
        with pytest.raises(ValueError, match="chunk_size must be at least 1"):
            combined(a, chunk_size)
    with pytest.raises(ValueError, match="return_varlen_states needs cu_seqlens"):
        combined(a, return_varlen_states=True)
    with pytest.raises(RuntimeError, match="ssd_chunk_scan: cu_seqlens needs x with batch = 1"):
        combined(a | {"cu_seqlens": torch.tensor([0, 19], device=device)})
