"""The chunk-wise parts of SSD in plain PyTorch, and functions over the op, against the oracle."""

import pytest
import torch
from harness import cases, compare, oracle
from mamba_ssm.modules.ssd_minimal import segsum, segsum_unstable, ssd_minimal_discrete
from mamba_ssm.ops.triton import (
    ssd_bmm,
    ssd_chunk_scan,
    ssd_chunk_state,
    ssd_combined,
    ssd_state_passing,
)

INF = float("inf")
CHUNK_SIZES = [1, 3, 8, 19, 64]
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


def check(actual, exact, dtype=None, eps=None):
    """Shape, dtype, and closeness to float64 values; eps of the sums, if not that of the type."""
    dtype = dtype or actual.dtype
    assert actual.shape == exact.shape and actual.dtype == dtype
    scale = exact.abs().max().item() if exact.numel() else 0
    eps = eps or torch.finfo(dtype).eps
    tolerance = {"rtol": 0, "atol": (2 if eps > 1e-4 else 64) * eps * scale}
    torch.testing.assert_close(actual.double().cpu(), exact.double().cpu(), **tolerance)


def make(dtype=torch.float32, device="cpu", **options):
    """Arguments of a call, and d, the step that its scan takes, in float64 and in its own type."""
    a = cases.Ssd(dtype=dtype, **options).call(device).arguments
    d = a["dt"].double()
    if "dt_bias" in a:
        d = d + a["dt_bias"].double()
    if a["dt_softplus"]:
        d = oracle.softplus(d)
    d = d.clamp(a.get("dt_min", 0.0), a.get("dt_max"))
    if "seq_idx" in a:
        d = torch.where((a["seq_idx"] < 0)[..., None], 0, d)
    return a, d


def judge(a, d=None, **replaced):
    """The oracle's float64 results; with d for its step."""
    if d is not None:
        replaced |= {"dt": d, "dt_softplus": False, "dt_bias": None, "dt_min": -INF}
        replaced |= {"dt_max": None}
    return oracle.exact("ssd_chunk_scan", {**a, **replaced}).results


def per_chunk(d, A, chunk_size):
    """(c, d) as the parts take them, float64, written with loops."""
    batch, seqlen, nheads = d.shape
    nchunks = -(-seqlen // chunk_size)
    steps = d.new_zeros(batch, nheads, nchunks, chunk_size)
    sums = torch.zeros_like(steps)
    for chunk in range(nchunks):
        total = d.new_zeros(batch, nheads)
        for i in range(chunk_size):
            t = chunk * chunk_size + i
            if t < seqlen:
                steps[:, :, chunk, i] = d[:, t]
                total = total + d[:, t] * A.double()
            sums[:, :, chunk, i] = total
    return sums, steps


def pieces(a, begin, end):
    """The tokens [begin, end) of a call, without states."""
    return {
        name: value[:, begin:end] if name in ("x", "B", "C", "z", "seq_idx") else value
        for name, value in a.items()
        if name != "initial_states"
    }


# One part at a time ------------------------------------------------------------------------------


@TYPES
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("limits", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
def test_chunk_cumsum(chunk_size, limits, softplus, dtype, device):
    a, d = make(dtype, device, limits=limits, dt_softplus=softplus)
    limit = (a.get("dt_min", 0.0), a.get("dt_max", INF))
    c_part, d_part = ssd_chunk_state._chunk_cumsum_fwd(
        a["dt"], a["A"], chunk_size, a["dt_bias"], softplus, limit
    )
    c, d = per_chunk(d, a["A"], chunk_size)
    inside = torch.float64 if dtype == torch.float64 else torch.float32
    check(c_part, c, inside)
    check(d_part, d, inside)


@TYPES
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("packing", [None, "packed", "padded"])
def test_chunk_state(chunk_size, packing, dtype, device):
    a, d = make(dtype, device, packing=packing)
    c, steps = per_chunk(d, a["A"], chunk_size)
    state = ssd_chunk_state._chunk_state_fwd(a["B"], a["x"], steps.to(dtype), c, a.get("seq_idx"))
    steps = steps.to(dtype).double()
    expected = []
    for chunk, begin in enumerate(range(0, 19, chunk_size)):
        piece = pieces(a, begin, begin + chunk_size)
        weight = torch.exp(c[:, :, chunk, -1:] - c[:, :, chunk]) * steps[:, :, chunk]
        weight = weight[..., : piece["x"].shape[1]]
        for b in range(2 if packing else 0):
            ids = oracle_ids(a, b)[begin : begin + chunk_size]
            weight[b, :, [i for i, name in enumerate(ids) if name != ids[-1]]] = 0
        B = piece["B"].double().repeat_interleave(2, dim=2)
        expected.append(torch.einsum("bhl,blhp,blhn->bhpn", weight, piece["x"].double(), B))
    expected = torch.stack(expected, dim=1)
    check(state, expected, torch.float64 if dtype == torch.float64 else torch.float32)
    if packing is None:
        rounded = ssd_chunk_state.chunk_state(a["B"], a["x"], steps, c, states_in_fp32=False)
        check(rounded, expected, dtype)
        buffer = torch.empty_like(state)
        again = ssd_chunk_state._chunk_state_fwd(a["B"], a["x"], steps, c, states=buffer)
        assert again is buffer
        check(buffer, expected)


def oracle_ids(a, b):
    """The sequence each token of a row stands in, padding in the one before (or the first)."""
    ids = a["seq_idx"][b].tolist()
    real = [name for name in ids if name >= 0] or ids[:1]
    current, result = real[0], []
    for name in ids:
        current = name if name >= 0 else current
        result.append(current)
    return result


@TYPES
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("packing", [None, "packed", "padded", "blank"])
@pytest.mark.parametrize("initial", [False, True])
def test_state_passing(chunk_size, packing, initial, dtype, device):
    """The state before each chunk is the final state of the tokens before it."""
    a, d = make(dtype, device, packing=packing, initial_states=initial)
    c, steps = per_chunk(d, a["A"], chunk_size)
    first = a["initial_states"].flatten(2) if initial else None
    added = ssd_chunk_state._chunk_state_fwd(
        a["B"].double(), a["x"].double(), steps, c, a.get("seq_idx")
    )
    arguments = (added.flatten(3), c[..., -1], first, a.get("seq_idx"), chunk_size)
    entering, final = ssd_state_passing._state_passing_fwd(*arguments)
    states = entering.unflatten(3, added.shape[3:])
    for chunk, begin in enumerate(range(0, 19, chunk_size)):
        start = {"initial_states": a["initial_states"]} if initial else {}
        before = judge({**pieces(a, 0, begin), **start}, d[:, :begin])["final_states"]
        if packing:  # a state that belongs to no token of the chunk may be dropped
            for b in range(2):
                ids = oracle_ids(a, b)
                if begin and ids[begin] != ids[begin - 1]:
                    before[b] = states[b, chunk]
        check(states[:, chunk], before)
    check(final.unflatten(2, added.shape[3:]), judge(a, d)["final_states"])
    assert ssd_state_passing._state_passing_fwd(*arguments, torch.float16)[0].dtype == torch.float16
    single, _ = ssd_state_passing.state_passing(added.float().flatten(3), c[..., -1], first)
    assert single.dtype == torch.float32


@TYPES
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("packing", [None, "packed", "padded"])
@pytest.mark.parametrize("groups", [True, False])
def test_bmm(chunk_size, packing, groups, dtype, device):
    a, _ = make(dtype, device, packing=packing)
    left, right = (a[n] if groups else a[n][:, :, 0] for n in ("C", "B"))
    out = ssd_bmm._bmm_chunk_fwd(left, right, chunk_size, a.get("seq_idx"), output_dtype=dtype)
    causal = ssd_bmm._bmm_chunk_fwd(left, right, chunk_size, a.get("seq_idx"), causal=True)
    nchunks = -(-19 // chunk_size)
    shape = (2, nchunks, *left.shape[2:-1], chunk_size, chunk_size)
    expected = torch.zeros(shape, dtype=torch.float64)
    products = torch.einsum("bi...k,bj...k->b...ij", left.double(), right.double())
    for i in range(19):
        for j in range(i // chunk_size * chunk_size, min(19, (i // chunk_size + 1) * chunk_size)):
            for b in range(2):
                ids = a["seq_idx"][b].tolist() if packing else [0] * 19
                if ids[i] == ids[j] and ids[i] >= 0:
                    place = (b, i // chunk_size, ..., i % chunk_size, j % chunk_size)
                    expected[place] = products[b, ..., i, j]
    check(out, expected, dtype)
    check(causal, expected.tril(), dtype)


@TYPES
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("packing", [None, "packed", "padded"])
@pytest.mark.parametrize("D, z", [(None, False), ("head", True), ("channel", True)])
def test_chunk_scan(chunk_size, packing, D, z, dtype, device):
    a, d = make(dtype, device, packing=packing, D=D, z=z)
    c, steps = per_chunk(d, a["A"], chunk_size)
    wide = {n: a[n].double() for n in ("x", "B", "C")}
    ids = a.get("seq_idx")
    added = ssd_chunk_state._chunk_state_fwd(wide["B"], wide["x"], steps, c, ids)
    entering, _ = ssd_state_passing._state_passing_fwd(
        added.flatten(3), c[..., -1], a["initial_states"].flatten(2), ids, chunk_size
    )
    states = entering.unflatten(3, added.shape[3:])
    cb = ssd_bmm._bmm_chunk_fwd(wide["C"], wide["B"], chunk_size, ids)
    out, out_x = ssd_chunk_scan._chunk_scan_fwd(
        cb, a["x"], steps, c, a["C"], states, a.get("D"), a.get("z"), ids
    )
    check(out, judge(a, d)["out"], dtype)
    if z:
        check(out_x, judge(a, d, z=None)["out"], dtype)
    else:
        assert out_x is None
    if packing is None:
        arguments = (a["B"], a["C"], a["x"], steps, c, states, a.get("D"), a.get("z"))
        check(ssd_chunk_scan.chunk_scan(*arguments), judge(a, d)["out"], dtype)


@TYPES
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("lengths", [(19,), (0, 5, 14), (3, 0, 16), (1, 1, 1, 16, 0), (8, 8, 3)])
def test_chunk_state_varlen(chunk_size, lengths, dtype, device):
    """Of every sequence, the first with the initial state wherever it ends; none reads outside."""
    a, d = make(dtype, device, batch=1, initial_states=True)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    ids = ids.to(device)
    c, steps = per_chunk(d, a["A"], chunk_size)
    added = ssd_chunk_state._chunk_state_fwd(a["B"].double(), a["x"].double(), steps, c, ids)
    entering, _ = ssd_state_passing._state_passing_fwd(
        added.flatten(3), c[..., -1], a["initial_states"].flatten(2), ids, chunk_size
    )
    states = entering.unflatten(3, added.shape[3:])[0].to(dtype)
    varlen = ssd_chunk_state.chunk_state_varlen(
        a["B"][0], a["x"][0], steps[0], c[0], bounds.int(), states
    )
    first = next(i for i, length in enumerate(lengths) if length)
    initial = a["initial_states"].new_zeros(len(lengths), *a["initial_states"].shape[1:])
    initial[first] = a["initial_states"][0]
    expected = judge(a, d, initial_states=initial, cu_seqlens=bounds)["final_states"]
    check(varlen, expected, dtype)


# Whole scans of them -----------------------------------------------------------------------------


@TYPES
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("seqlen", [1, 16, 19])
def test_plain_scan(chunk_size, softplus, seqlen, dtype, device):
    a, _ = make(dtype, device, seqlen=seqlen, dt_softplus=softplus, initial_states=False)
    order = [a[n] for n in ("D", "z", "dt_bias")]
    for function in (ssd_combined.mamba_chunk_scan, ssd_combined.ssd_chunk_scan_combined_ref):
        out = function(a["x"], a["dt"], a["A"], a["B"], a["C"], chunk_size, *order, softplus)
        check(out, judge(a)["out"], dtype)


def test_plain_scan_has_gradients():
    a, _ = make(torch.float64, seqlen=5, headdim=2, dstate=2, nheads=2)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    leaves = [a[name].detach().clone().requires_grad_() for name in names]

    def function(x, dt, A, B, C, *others):
        return ssd_combined.mamba_chunk_scan(x, dt, A, B, C, 3, *others, True)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_steps_at_their_limits(device):
    """They have the derivative of the steps between, in the op and in plain PyTorch."""
    a, _ = make(torch.float64, device, seqlen=4)
    x, A, B, C = (a[name] for name in ("x", "A", "B", "C"))
    dt = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64, device=device)
    dt = dt[None, :, None].expand(a["dt"].shape).clone().requires_grad_()
    limit = {"dt_limit": (0.0, 1.0)}
    outs = [
        ssd_combined.mamba_chunk_scan_combined(x, dt, A, B, C, 3, **limit),
        ssd_combined.ssd_selective_scan(x, dt, A, B, C, **limit),
    ]
    op, plain = (torch.autograd.grad(out.sum(), dt)[0] for out in outs)
    torch.testing.assert_close(plain, op)
    assert (op[:, :3] != 0).all() and (op[:, 3] == 0).all()
    d = ssd_chunk_state._chunk_cumsum_fwd(dt, A, 4, **limit)[1]
    (ddt,) = torch.autograd.grad(d.sum(), dt)
    assert (ddt[:, :3] == 1).all() and (ddt[:, 3] == 0).all()


@TYPES
@pytest.mark.parametrize("limits", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("D", [None, "head", "channel"])
def test_as_selective_scan(limits, softplus, D, dtype, device):
    a, _ = make(
        dtype, device, limits=limits, dt_softplus=softplus, D=D, initial_states=False, nheads=4
    )
    limit = (a.get("dt_min", 0.0), a.get("dt_max", INF))
    arguments = [a.get(n) for n in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    out = ssd_combined.ssd_selective_scan(*arguments, softplus, limit)
    expected = judge(a)["out"]
    if dtype == torch.bfloat16:
        torch.testing.assert_close(out.double().cpu(), expected, rtol=0.05, atol=0.05)
        return
    check(out, expected, dtype)
    arguments[1] = a["dt"][..., None].expand(-1, -1, -1, 5)
    arguments[2] = a["A"].repeat_interleave(5)[:, None].expand(-1, 4)
    arguments[7] = a["dt_bias"][:, None].expand(-1, 5)
    again = ssd_combined.ssd_selective_scan(*arguments, softplus, limit)
    torch.testing.assert_close(again, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block_len", [1, 4, 24])
@pytest.mark.parametrize("initial", [False, True])
def test_minimal(block_len, initial, dtype, device):
    a, d = make(dtype, device, seqlen=24, D=None, z=False, ngroups=4, initial_states=initial)
    d = d.to(dtype)
    Y, final = ssd_minimal_discrete(
        a["x"] * d[..., None],
        a["A"] * d,
        a["B"],
        a["C"],
        block_len,
        a["initial_states"][:, None] if initial else None,
    )
    truth = judge(a, d)
    check(Y, truth["out"], dtype)
    check(final, truth["final_states"], dtype)


def test_minimal_refuses():
    X, A, B = torch.randn(1, 8, 2, 3), torch.randn(1, 8, 2), torch.randn(1, 8, 2, 4)
    with pytest.raises(ValueError, match="block_len = 3, got 8"):
        ssd_minimal_discrete(X, A, B, B, 3)
    with pytest.raises(ValueError, match="one dtype"):
        ssd_minimal_discrete(X, A.double(), B, B, 4)


def test_segsum():
    x = torch.randn(2, 6, dtype=torch.float64)
    sums = segsum(x)
    for i in range(6):
        for j in range(6):
            expected = x[:, j + 1 : i + 1].sum(-1) if i >= j else torch.full((2,), -INF).double()
            torch.testing.assert_close(sums[:, i, j], expected)
    torch.testing.assert_close(segsum_unstable(x), sums)


# Derivatives of the parts ------------------------------------------------------------------------


def gradients(function, inputs, *cotangents):
    """Of function in float64 inputs, by autograd."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    return torch.autograd.grad(results, leaves, [c.double() for c in cotangents])


def of_sums(function, inputs, *cotangents):
    """As gradients, with the last input, sums c along chunks, in terms of what is summed up."""
    *others, c = inputs
    steps = torch.cat([c[..., :1], c.diff(dim=-1)], dim=-1).double()
    return gradients(
        lambda *leaves: function(*leaves[:-1], leaves[-1].cumsum(-1)), [*others, steps], *cotangents
    )


def parts(dtype, device, packing, chunk_size):
    """Arguments of the parts of one scan, and gradients for out and for states, at random."""
    a, d = make(dtype, device, packing=packing)
    c, steps = per_chunk(d, a["A"], chunk_size)
    p = {"x": a["x"], "B": a["B"], "C": a["C"], "D": a["D"], "z": a["z"], "ids": a.get("seq_idx")}
    p |= {"dt": steps.to(dtype), "c": c.float() if dtype != torch.float64 else c}
    added = ssd_chunk_state._chunk_state_fwd(a["B"], a["x"], p["dt"], p["c"], p["ids"])
    p["cb"] = ssd_bmm._bmm_chunk_fwd(a["C"], a["B"], chunk_size, p["ids"])
    p["states"] = torch.randn_like(added, dtype=dtype)
    p["dout"], p["dstates"] = torch.randn_like(a["x"]), torch.randn_like(added)
    return p


@TYPES
@pytest.mark.parametrize("chunk_size", [1, 8, 64])
@pytest.mark.parametrize("limits", [False, True])
def test_chunk_cumsum_bwd(chunk_size, limits, dtype, device):
    a, _ = make(dtype, device, limits=limits)
    limit = (a.get("dt_min", 0.0), a.get("dt_max", INF))
    leaves = [a[name] for name in ("dt", "A", "dt_bias")]

    def forward(dt, A, bias):
        c, d = ssd_chunk_state._chunk_cumsum_fwd(dt, A, chunk_size, bias, True, limit)
        return torch.cat([c[..., :1], c.diff(dim=-1)], dim=-1), d

    shape = ssd_chunk_state._chunk_cumsum_fwd(a["dt"], a["A"], chunk_size)[0].shape
    ddA, dd = torch.randn(2, *shape, dtype=dtype, device=device)
    expected = gradients(forward, leaves, ddA, dd)
    got = ssd_chunk_state._chunk_cumsum_bwd(ddA, dd, a["dt"], a["A"], a["dt_bias"], True, limit)
    for gradient, exact, kind in zip(got, expected, (dtype, None, None), strict=True):
        check(gradient, exact, kind)
    buffer = torch.full_like(a["dt"], torch.nan)
    ddt, _, dbias = ssd_chunk_state._chunk_cumsum_bwd(
        ddA, dd, a["dt"], a["A"], dt_limit=limit, ddt=buffer
    )
    assert ddt is buffer and dbias is None and not buffer.isnan().any()


@TYPES
@pytest.mark.parametrize("chunk_size", [1, 8, 64])
@pytest.mark.parametrize("packing", [None, "packed", "padded"])
def test_chunk_state_bwd(chunk_size, packing, dtype, device):
    p = parts(dtype, device, packing, chunk_size)
    inputs, wide = [p[n] for n in ("B", "x", "dt", "c")], p["c"].dtype

    def forward(*leaves):
        return ssd_chunk_state._chunk_state_fwd(*leaves, p["ids"])

    dB, *_, ddA = of_sums(forward, inputs, p["dstates"])
    arguments = (p["x"], p["dt"], p["c"], p["dstates"], p["ids"])
    check(ssd_chunk_state._chunk_state_bwd_db(*arguments, ngroups=2), dB, wide)
    for got, exact in zip(
        ssd_chunk_state._chunk_state_bwd_db(*arguments, p["B"], 2), (dB, ddA), strict=True
    ):
        check(got, exact, wide)
    stable = ssd_chunk_state._chunk_state_bwd_ddAcs_stable
    check(stable(p["B"], *arguments), ddA, wide)
    if packing is None:
        expected = gradients(forward, inputs, p["dstates"])[1:]
        buffer = torch.full_like(p["x"], torch.nan)
        for dx in (None, buffer):
            got = ssd_chunk_state._chunk_state_bwd_dx(*inputs, p["dstates"], dx)
            for gradient, exact in zip(got, expected, strict=True):
                check(gradient, exact)
        assert got[0] is buffer


@TYPES
@pytest.mark.parametrize("packing", [None, "packed", "blank"])
@pytest.mark.parametrize("initial", [False, True])
def test_state_passing_bwd(packing, initial, dtype, device):
    p = parts(dtype, device, packing, 4)
    chunks = p["c"][..., -1]
    first = torch.randn_like(p["dstates"][:, 0].flatten(2))
    dout, dfinal = p["dstates"].flatten(3), torch.randn_like(first)
    added = p["states"].flatten(3)

    def forward(states, chunks, first):
        return ssd_state_passing._state_passing_fwd(states, chunks, first, p["ids"], 4)

    expected = gradients(forward, [added, chunks, first], dout, dfinal)
    entering, _ = forward(added.double(), chunks.double(), first.double())
    got = ssd_state_passing._state_passing_bwd(
        entering, chunks, dout, dfinal, p["ids"], initial, dtype, torch.float16, 4
    )
    assert got[3].dtype == torch.float16 and got[0].dtype == dtype
    assert (got[2] is not None) == initial
    for gradient, exact in zip(got[: 2 + initial], expected):
        check(gradient, exact)
    without = ssd_state_passing._state_passing_bwd(entering, chunks, dout)
    assert len(without) == 3 and (without[0][:, -1] == 0).all()


@TYPES
@pytest.mark.parametrize("chunk_size", [1, 8, 64])
@pytest.mark.parametrize("groups", [True, False])
def test_bmm_bwd(chunk_size, groups, dtype, device):
    a, _ = make(dtype, device)
    left, right = (a[n] if groups else a[n][:, :, 0] for n in ("C", "B"))
    dout = torch.randn_like(ssd_bmm._bmm_chunk_fwd(left, right, chunk_size))

    def forward(left, right):
        return ssd_bmm._bmm_chunk_fwd(left, right, chunk_size)

    dleft, dright = gradients(forward, (left, right), dout)
    check(ssd_bmm._bmm_chunk_bwd(left, dout), dright, dtype)
    buffer = torch.empty_like(right)
    got = ssd_bmm._bmm_chunk_bwd(right, dout.mT, residual=left, out=buffer)
    assert got is buffer
    check(buffer, dleft + left.double(), dtype)


@TYPES
@pytest.mark.parametrize("chunk_size", [1, 8, 64])
@pytest.mark.parametrize("packing", [None, "packed", "padded"])
def test_chunk_scan_bwd(chunk_size, packing, dtype, device):
    """Each derivative is one of the whole scan of chunks, with the rest of it left out."""
    p, scan = parts(dtype, device, packing, chunk_size), ssd_chunk_scan
    ids, dout, wide = p["ids"], p["dout"], p["c"].dtype

    def tokens(cb, x, dt, c):
        if ids is not None:  # gradients across sequences are not wanted
            ones = torch.ones_like(p["C"], dtype=torch.float64)[..., :1, :1]
            cb = cb * ssd_bmm._bmm_chunk_fwd(ones, ones, chunk_size, ids)
        nothing = torch.zeros_like(p["states"])
        return scan._chunk_scan_fwd(cb, x, dt, c, p["C"], nothing, None, None, ids)[0]

    def states(C, states, c):
        nothing = torch.zeros_like(p["x"], dtype=torch.float64)
        return scan._chunk_scan_fwd(p["cb"], nothing, p["dt"], c, C, states, None, None, ids)[0]

    inputs = [p[n] for n in ("cb", "x", "dt", "c")]
    dcb, dx, ddt, _ = gradients(tokens, inputs, dout)
    ddA = of_sums(tokens, inputs, dout)[-1]
    arguments = (p["x"], p["dt"], p["c"], dout, ids)
    check(scan._chunk_scan_bwd_dcb(*arguments, ngroups=2), dcb, wide)
    got = scan._chunk_scan_bwd_dcb(*arguments, p["cb"], 2)
    check(got[0], dcb, wide)
    check(got[1], ddA, wide)

    dC, dstates, dc = gradients(states, [p["C"], p["states"], p["c"]], dout)
    check(scan._chunk_scan_bwd_dstates(p["C"], p["c"], dout, ids, wide), dstates, wide)
    assert scan._chunk_scan_bwd_dstates(p["C"], p["c"], dout).dtype == dtype
    arguments = (p["states"], p["c"], dout, ids)
    check(scan._chunk_scan_bwd_dC(*arguments, ngroups=2), dC, wide)
    got = scan._chunk_scan_bwd_dC(*arguments, p["C"], 2)
    check(got[0], dC, wide)
    check(got[1], dc, wide)
    check(scan._chunk_scan_bwd_ddAcs_prev(p["states"], p["C"], dout, p["c"], ids), dc, wide)

    _, dx_added, ddt_added, _ = gradients(
        lambda *leaves: ssd_chunk_state._chunk_state_fwd(*leaves, ids),
        [p[n] for n in ("B", "x", "dt", "c")],
        p["dstates"],
    )
    kept = dout.double() if ids is None else torch.where((ids >= 0)[..., None, None], dout, 0)
    for D in (p["D"], torch.randn(4, 5, dtype=dtype, device=device), None):
        got = scan._chunk_scan_chunk_state_bwd_dx(
            p["x"], p["dt"], p["c"], p["B"], p["cb"], dout, p["dstates"], D, ids
        )
        skip, dD = 0, None
        if D is not None:
            _, skip, dD = skip_gradients(D, p["x"], kept)
            check(got[2], dD, D.dtype)
        assert (got[2] is None) == (D is None)
        check(got[0], dx + dx_added + skip, dtype)
        check(got[1], ddt + ddt_added, dtype)
        if packing is None:
            got = scan._chunk_scan_bwd_dx(p["cb"], p["x"], p["dt"], p["c"], dout, D)
            check(got[0], dx + skip, dtype)
            check(got[1], ddt, dtype)
    if packing is None:
        arguments = (p["x"], p["dt"], p["c"], dout, p["cb"])
        check(scan._chunk_scan_bwd_ddAcs_stable(*arguments), ddA, wide)


def skip_gradients(D, x, dout):
    """D x, and gradients of x and D, for dout."""
    x, D, dout = x.double(), D.double(), dout.double()
    per_channel = D if D.dim() == 2 else D[:, None].expand(-1, x.shape[-1])
    dD = torch.einsum("blhp,blhp->hp", x, dout)
    return x * per_channel, dout * per_channel, dD if D.dim() == 2 else dD.sum(-1)


@TYPES
@pytest.mark.parametrize("D", ["head", "channel", None])
def test_gate_bwd(D, dtype, device):
    """dz and what is before the gate; the part of ddA_cumsum of tokens as readers."""
    p, scan = parts(dtype, device, None, 8), ssd_chunk_scan
    D = {"head": p["D"], "channel": torch.randn(4, 5, dtype=dtype, device=device)}.get(D)
    x, z, dout = p["x"], p["z"], p["dout"]
    y = torch.randn_like(x)
    dy, dz = gradients(lambda y, z: y * torch.nn.functional.silu(z), (y, z), dout)
    skip, dD = (0, None) if D is None else skip_gradients(D, x, dy)[::2]
    ddA = (dy * (y.double() - skip)).sum(-1)  # (batch, seqlen, nheads)
    buffer = torch.empty_like(z)
    got = scan._chunk_scan_bwd_dz(x, z, y, dout, 8, D=D, dz=buffer, recompute_output=True)
    assert got[0] is buffer
    check(got[0], dz)
    check(got[1], dy)
    assert (got[2] is None) == (D is None)
    if D is not None:
        check(got[2], dD)
    check(got[3].flatten(2)[..., : x.shape[1]].mT, ddA)
    check(got[4], y.double() * torch.nn.functional.silu(z.double()))
    assert len(scan._chunk_scan_bwd_dz(x, z, y, dout, 8, has_ddAcs=False)) == 3


# Inside the op -----------------------------------------------------------------------------------


@TYPES
@pytest.mark.parametrize("chunk_size", [4, 64])
@pytest.mark.parametrize("packing", [None, "packed", "padded"])
@pytest.mark.parametrize("z", [False, True])
def test_combined_fwd(chunk_size, packing, z, dtype, device):
    a, d = make(dtype, device, packing=packing, z=z)
    out, out_x, d_part, c_part, states, final = ssd_combined._mamba_chunk_scan_combined_fwd(
        *(a[n] for n in ("x", "dt", "A", "B", "C")),
        chunk_size,
        **{n: a.get(n) for n in ("D", "z", "dt_bias", "initial_states", "seq_idx")},
        dt_softplus=True,
    )
    c, d = per_chunk(d, a["A"], chunk_size)
    check(c_part, c)
    check(d_part, d)
    check(out, judge(a)["out"], dtype)
    check(final, judge(a)["final_states"], eps=compare.states_eps(dtype, device))
    assert states.shape == (2, -(-19 // chunk_size), 4, 5, 4) and states.dtype == dtype
    check(states[:, 0], a["initial_states"].to(dtype))
    if z:
        check(out_x, judge(a, z=None)["out"], dtype)
    else:
        assert out_x is None


@pytest.mark.parametrize("packing", [None, "packed"])
def test_combined_fwd_of_cu_seqlens(packing, device):
    a, _ = make(torch.float64, device, batch=1, num_sequences=3, packing=packing)
    *_, states, final, varlen = ssd_combined._mamba_chunk_scan_combined_fwd(
        *(a[n] for n in ("x", "dt", "A", "B", "C")),
        4,
        **{n: a.get(n) for n in ("D", "z", "dt_bias", "initial_states", "seq_idx", "cu_seqlens")},
        dt_softplus=True,
    )
    check(varlen, judge(a)["final_states"])
    assert final.shape == (1, 4, 5, 4) and states.shape == (1, 5, 4, 5, 4)


@TYPES
def test_combined_bwd(dtype, device):
    call = cases.Ssd(dtype=dtype, packing="packed").call(device)
    a, names = call.arguments, call.differentiable
    leaves = {n: a[n].detach().requires_grad_() for n in names}
    results = call.invoke(**leaves)
    expected = torch.autograd.grad(
        list(results.values()), list(leaves.values()), list(call.cotangents.values())
    )
    buffers = {"d" + n: torch.full_like(a[n], torch.nan) for n in ("x", "dt", "B", "C", "z")}
    *gradients, gated = ssd_combined._mamba_chunk_scan_combined_bwd(
        call.cotangents["out"],
        *(a[n] for n in ("x", "dt", "A", "B", "C")),
        call.invoke(z=None)["out"],
        64,
        **{n: a[n] for n in ("D", "z", "dt_bias", "initial_states", "seq_idx")},
        dfinal_states=call.cotangents["final_states"],
        dt_softplus=True,
        recompute_output=True,
        **buffers,
    )
    for name, gradient, other in zip(names, gradients, expected, strict=True):
        assert torch.equal(gradient, other), name
        if "d" + name in buffers:
            assert gradient is buffers["d" + name]
    torch.testing.assert_close(gated, results["out"].detach())
