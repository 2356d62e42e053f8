"""The judge judged: references against scalar loops, and planted errors that must be caught."""

import cmath
import dataclasses
import math

import pytest
import torch
from harness import cases, compare, fuzz, oracle, poison


def _silu(a):
    return a / (1 + math.exp(-a))


def _ids(call, b):
    if "seq_idx" not in call.arguments:
        x = call.arguments["x" if "x" in call.arguments else "u"]
        return [0] * x.shape[1 if x.dim() == 4 else -1]
    return call.arguments["seq_idx"][b].tolist()


@pytest.mark.parametrize("packing", cases.PACKINGS)
@pytest.mark.parametrize("width", [1, 2, 4, 9])
@pytest.mark.parametrize("seed", range(3))
def test_causal_conv1d(packing, width, seed):
    call = cases.Conv(dtype=torch.float64, packing=packing, width=width, seqlen=9, seed=seed).call()
    x, weight, bias, initial = (
        call.arguments[name].tolist() for name in ("x", "weight", "bias", "initial_states")
    )
    truth = oracle.exact(call.op, call.arguments).results
    for b in range(len(x)):
        ids = _ids(call, b)
        real = [t for t, token in enumerate(ids) if token >= 0]
        for c in range(len(x[b])):
            # position s of the row: (id, value); the columns before it have the first real id
            column = {
                s: (ids[real[0]], initial[b][c][s + width - 1]) for s in range(1 - width, 0) if real
            }
            column |= {s: (ids[s], x[b][c][s] if ids[s] >= 0 else 0.0) for s in range(len(ids))}
            for t in range(len(ids)):
                a = bias[c] + sum(
                    weight[c][k] * column[t - width + 1 + k][1]
                    for k in range(width)
                    if ids[t] >= 0 and column[t - width + 1 + k][0] == ids[t]
                )
                expected = _silu(a) if ids[t] >= 0 else 0
                assert truth["out"][b, c, t].item() == pytest.approx(expected, abs=1e-14)
            for j in range(width - 1):
                if not real:
                    expected = initial[b][c][j]
                else:
                    token, value = column[real[-1] - (width - 2) + j]
                    expected = value if token == ids[real[-1]] else 0
                assert truth["final_states"][b, c, j].item() == expected


@pytest.mark.parametrize("packing", cases.PACKINGS)
@pytest.mark.parametrize("form", [(1, 3), ("flat", "constant"), ("constant", 2)])
@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_selective_scan(packing, form, complex_A, seed):
    call = cases.Scan(
        dtype=torch.float64,
        packing=packing,
        B=form[0],
        C=form[1],
        complex_A=complex_A,
        seqlen=9,
        seed=seed,
        wide_delta=seed == 1,
    ).call()
    a = {k: v.tolist() if torch.is_tensor(v) else v for k, v in call.arguments.items()}
    truth = oracle.exact(call.op, call.arguments).results
    dim, dstate = call.arguments["A"].shape

    def pick(name, b, c, n, t):
        M = call.arguments[name]
        if M.dim() == 2:
            return a[name][c][n]
        rows = a[name][b] if M.dim() == 3 else a[name][b][c * M.shape[1] // dim]
        return complex(rows[n][2 * t], rows[n][2 * t + 1]) if complex_A else rows[n][t]

    for b in range(call.arguments["u"].shape[0]):
        ids = _ids(call, b)
        for c in range(dim):
            h, last = list(a["initial_state"][b][c]), None
            for t, token in enumerate(ids):
                got = truth["out"][b, c, t].item()
                if token < 0:
                    assert got == 0
                    continue
                if last not in (None, token):
                    h = [0.0] * dstate
                last = token
                d = a["delta"][b][c][t] + a["delta_bias"][c]
                d = d if d > 20 else math.log1p(math.exp(d))
                u = a["u"][b][c][t]
                h = [
                    cmath.exp(d * a["A"][c][n]) * h[n] + d * pick("B", b, c, n, t) * u
                    for n in range(dstate)
                ]
                y = sum(pick("C", b, c, n, t) * h[n] for n in range(dstate)).real
                y = (2 * y if complex_A else y) + a["D"][c] * u
                assert got == pytest.approx(y * _silu(a["z"][b][c][t]), rel=1e-12, abs=1e-12)
            for n in range(dstate):
                assert abs(truth["last_state"][b, c, n].item() - h[n]) < 1e-12


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("seqlen", [None, 1, 3, 8])
def test_causal_conv1d_update(ring, seqlen):
    call = cases.ConvUpdate(
        dtype=torch.float64, ring=ring, seqlen=seqlen, state_len=5, num_slots=7, seed=3
    ).call()
    a = {k: v.tolist() if torch.is_tensor(v) else v for k, v in call.arguments.items()}
    truth = oracle.exact(call.op, call.arguments).results
    state = [[list(column) for column in slot] for slot in a["conv_state"]]
    width, state_len = len(a["weight"][0]), 5
    for b, slot in enumerate(a["conv_state_indices"]):
        for c in range(len(a["x"][b])):
            tokens = [a["x"][b][c]] if seqlen is None else a["x"][b][c]
            for t, token in enumerate(tokens):
                got = truth["out"][b, c] if seqlen is None else truth["out"][b, c, t]
                if slot < 0:
                    assert got.item() == 0
                    continue
                past = state[slot][c]
                if ring:
                    next_column = (a["cache_seqlens"][b] + t) % state_len
                    window = [past[(next_column - j) % state_len] for j in range(width - 1, 0, -1)]
                    past[next_column] = token
                else:
                    window = past[state_len - (width - 1) :]
                    state[slot][c] = past[1:] + [token]
                taps = zip(a["weight"][c], [*window, token])
                expected = _silu(a["bias"][c] + sum(w * x for w, x in taps))
                assert got.item() == pytest.approx(expected, abs=1e-14)
    assert truth["conv_state"].tolist() == state


@pytest.mark.parametrize("nheads", [None, 6])
def test_selective_state_update(nheads):
    call = cases.StateUpdate(
        dtype=torch.float64, nheads=nheads, ngroups=3, num_slots=5, batch=4, seed=1
    ).call()
    a = call.arguments
    truth = oracle.exact(call.op, a).results
    state = a["state"].clone()
    for b, slot in enumerate(a["state_batch_indices"].tolist()):
        if slot < 0:
            assert (truth["out"][b] == 0).all()
            continue
        for place in (
            torch.cartesian_prod(*map(torch.arange, a["x"].shape[1:]))
            .reshape(-1, 1 if nheads is None else 2)
            .tolist()
        ):
            place = tuple(place)
            d = (a["dt"][b][place] + a["dt_bias"][place]).item()
            d = d if d > 20 else math.log1p(math.exp(d))
            group = () if nheads is None else (place[0] * 3 // nheads,)
            y = (a["D"][place] * a["x"][b][place]).item()
            for n in range(a["A"].shape[-1]):
                B, C = a["B"][b][group][n].item(), a["C"][b][group][n].item()
                s = state[slot][place][n].item() * math.exp(d * a["A"][place][n].item())
                s += d * B * a["x"][b][place].item()
                assert truth["state"][slot][place][n].item() == pytest.approx(s, rel=1e-13)
                y += C * s
            expected = y * _silu(a["z"][b][place].item())
            assert truth["out"][b][place].item() == pytest.approx(expected, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("nheads", [None, 6])
def test_selective_state_update_tokens(nheads):
    """Several tokens: one after the other."""
    call = cases.StateUpdate(
        dtype=torch.float64, nheads=nheads, tokens=3, num_slots=5, intermediate_states=True
    ).call()
    a = dict(call.arguments)
    truth = oracle.exact(call.op, a).results
    kept = a.pop("intermediate_states")
    slots = a["state_batch_indices"].tolist()
    assert any(slot >= 0 for slot in slots) and any(slot < 0 for slot in slots)
    for t in range(3):
        token = {name: call.arguments[name][:, t] for name in ("x", "dt", "B", "C", "z")}
        step = oracle.exact(call.op, {**a, **token}).results
        assert torch.equal(truth["out"][:, t], step["out"])
        for b, slot in enumerate(slots):
            expected = step["state"][slot] if slot >= 0 else kept[b, t]
            assert torch.equal(truth["intermediate_states"][b, t], expected)
        a["state"] = step["state"]
    assert torch.equal(truth["state"], a["state"])


@pytest.mark.parametrize("packing", cases.PACKINGS)
@pytest.mark.parametrize("num_sequences", [None, 1, 4])
@pytest.mark.parametrize("initial_states", [False, True, "first"])
@pytest.mark.parametrize("seed", range(2))
def test_ssd_chunk_scan(packing, num_sequences, initial_states, seed):
    call = cases.Ssd(
        dtype=torch.float64,
        batch=2 if num_sequences is None else 1,
        seqlen=9,
        nheads=2,
        headdim=3,
        dstate=2,
        packing=packing,
        num_sequences=num_sequences,
        initial_states=bool(initial_states) if num_sequences is None else initial_states,
        limits=seed == 1,
        D=("head", "channel")[seed],
    ).call()
    a = {k: v.tolist() if torch.is_tensor(v) else v for k, v in call.arguments.items()}
    truth = oracle.exact(call.op, call.arguments).results
    bounds = a.get("cu_seqlens")
    spans = [(0, *span) for span in zip(bounds, bounds[1:])] if bounds else [(0, 0, 9), (1, 0, 9)]
    for number, (b, begin, end) in enumerate(spans):
        ids = _ids(call, b)
        for h in range(2):
            for p in range(3):
                state, last = [0.0, 0.0], None
                if number < len(a.get("initial_states", [])):
                    state = list(a["initial_states"][number][h][p])
                for t in range(begin, end):
                    got = truth["out"][b, t, h, p].item()
                    if ids[t] < 0:
                        assert got == 0
                        continue
                    if last not in (None, ids[t]):
                        state = [0.0, 0.0]
                    last = ids[t]
                    d = math.log1p(math.exp(a["dt"][b][t][h] + a["dt_bias"][h]))
                    d = min(max(d, a.get("dt_min", 0)), a.get("dt_max", math.inf))
                    x, B, C = a["x"][b][t][h][p], a["B"][b][t][h], a["C"][b][t][h]
                    state = [math.exp(d * a["A"][h]) * s + d * x * B_n for s, B_n in zip(state, B)]
                    y = sum(C_n * s for C_n, s in zip(C, state))
                    y += (a["D"][h][p] if seed else a["D"][h]) * x
                    expected = y * _silu(a["z"][b][t][h][p])
                    assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)
                got = truth["final_states"][number, h, p].tolist()
                assert got == pytest.approx(state, rel=1e-12, abs=1e-12)


def test_ssd_is_a_selective_scan():
    """One whose channels of a head share a decay: two references, one recurrence."""
    for packing in (None, "padded"):
        case = cases.Ssd(dtype=torch.float64, packing=packing)
        a = case.call().arguments

        def channels(M):
            return M.repeat_interleave(case.headdim, dim=-1)

        truth = oracle.exact(case.op, a).results
        scan = oracle.exact(
            "selective_scan",
            {
                "u": a["x"].flatten(2).mT,
                "delta": channels(a["dt"]).mT,
                "A": channels(a["A"])[:, None].expand(-1, case.dstate),
                "B": a["B"].permute(0, 2, 3, 1),
                "C": a["C"].permute(0, 2, 3, 1),
                "D": channels(a["D"]),
                "z": a["z"].flatten(2).mT,
                "delta_bias": channels(a["dt_bias"]),
                "initial_state": a["initial_states"].flatten(1, 2),
                "seq_idx": a.get("seq_idx"),
                "delta_softplus": True,
            },
        ).results
        torch.testing.assert_close(scan["out"].mT.reshape(a["x"].shape), truth["out"])
        torch.testing.assert_close(
            scan["last_state"].reshape(a["initial_states"].shape), truth["final_states"]
        )


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_rms_norm_gated(norm_before_gate, is_rms_norm):
    call = cases.NormGated(
        dtype=torch.float64,
        leading=(2, 3),
        groups=3,
        group=5,
        norm_before_gate=norm_before_gate,
        is_rms_norm=is_rms_norm,
    ).call()
    truth = oracle.exact(call.op, call.arguments).results["out"]
    a = {k: v.tolist() if torch.is_tensor(v) else v for k, v in call.arguments.items()}
    for i, j, g in ((i, j, g) for i in range(2) for j in range(3) for g in range(3)):
        channels = range(5 * g, 5 * g + 5)
        x, z = a["x"][i][j], a["z"][i][j]
        s = [x[c] if norm_before_gate else x[c] * _silu(z[c]) for c in channels]
        mean = 0 if is_rms_norm else sum(s) / 5
        root = math.sqrt(sum((v - mean) ** 2 for v in s) / 5 + a["eps"])
        for c in channels:
            y = (s[c - 5 * g] - mean) / root * a["weight"][c] + a["bias"][c]
            y *= _silu(z[c]) if norm_before_gate else 1
            assert truth[i, j, c].item() == pytest.approx(y, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("x1", [False, True])
def test_layer_norm(is_rms_norm, x1):
    call = cases.LayerNorm(
        dtype=torch.float64,
        leading=(4,),
        channels=6,
        is_rms_norm=is_rms_norm,
        x1=x1,
        rowscale=not x1,
        weight1=True,
        bias1=True,
        masks=True,
        dropout_p=0.4,
    ).call()
    truth = oracle.exact(call.op, call.arguments).results
    a = {k: v.tolist() if torch.is_tensor(v) else v for k, v in call.arguments.items()}
    for r in range(4):
        s = []
        for c in range(6):
            v = a["residual"][r][c]
            if a["dropout_mask"][r][c]:
                v += a["x"][r][c] * (1 if x1 else a["rowscale"][r]) / 0.6
            if x1 and a["dropout_mask1"][r][c]:
                v += a["x1"][r][c] / 0.6
            s.append(v)
        mean = 0 if is_rms_norm else sum(s) / 6
        root = math.sqrt(sum((v - mean) ** 2 for v in s) / 6 + a["eps"])
        for c in range(6):
            n = (s[c] - mean) / root
            wanted = {
                "out": n * a["weight"][c] + a["bias"][c],
                "out1": n * a["weight1"][c] + a["bias1"][c],
                "residual_out": s[c],
            }
            for name, value in wanted.items():
                assert truth[name][r, c].item() == pytest.approx(value, rel=1e-12, abs=1e-13)


def test_gradients_are_derivatives():
    """The oracles' autograd graphs, against finite differences."""
    for case in (
        cases.NormGated(leading=(2,), group=4, groups=2),
        cases.LayerNorm(leading=(2,), channels=5, x1=True, weight1=True, masks=True),
        cases.Conv(dim=2, seqlen=7, packing="padded"),
        cases.Scan(dim=2, seqlen=5, dstate=2, packing="padded"),
        cases.Scan(dim=2, seqlen=4, dstate=2, complex_A=True, C="constant"),
        cases.Ssd(nheads=2, headdim=2, seqlen=5, dstate=2, packing="padded", limits=True),
        cases.Ssd(nheads=2, headdim=2, seqlen=5, dstate=2, batch=1, num_sequences=3),
        cases.Inner(dim=2, seqlen=4, dstate=2, rms=True, proj_bias=True),
        cases.Inner2(nheads=2, headdim=2, seqlen=5, dstate=2, d_nonssm=1, packing="padded"),
        cases.Inner2(nheads=2, headdim=2, seqlen=5, dstate=2, batch=1, num_sequences=3, norm=False),
    ):
        call = dataclasses.replace(case, dtype=torch.float64).call()
        leaves = [call.arguments[n].detach().clone().requires_grad_() for n in call.differentiable]

        def function(*leaves):
            arguments = {**call.arguments, **dict(zip(call.differentiable, leaves))}
            return tuple(oracle.REFERENCES[call.op](**arguments).values())

        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


# What the comparison must and must not let pass --------------------------------------------------


def _judged(values):
    """A comparison with `values` as truth and its rounding as the plain version."""

    def check(actual, **options):
        rounded = values.to(actual.dtype)
        compare.check_close("op", "result", actual, values, rounded, values, **options)

    return check


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_comparison(dtype):
    values = cases.Draw(0).normal(3, 40)
    check = _judged(values)
    check(values.to(dtype))
    much = (200 if dtype == torch.float64 else 20) * torch.finfo(dtype).eps
    for planted in (
        lambda t: t[0, 3].add_(much * values.abs().max()),  # one wrong element
        lambda t: t.mul_(1 + much),  # all a little
        lambda t: t[2, 39].fill_(float("nan")),
        lambda t: t[1, 1].fill_(float("inf")),
        lambda t: t[0].copy_(t[1].clone()),
    ):
        wrong = values.to(dtype, copy=True)
        planted(wrong)
        with pytest.raises(AssertionError):
            check(wrong)
    with pytest.raises(AssertionError):
        compare.check_close("op", "r", values[:2].to(dtype), values, values.to(dtype), values)
    other = torch.float32 if dtype != torch.float32 else torch.float64
    with pytest.raises(AssertionError):
        compare.check_close("op", "r", values.to(other), values, values.to(dtype), values)


def test_exact_comparison():
    values = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    check = _judged(values)
    check(values.float(), exact_values=True)
    wrong = values.float()
    wrong[1, 1] = wrong[1, 1].nextafter(torch.tensor(100.0))
    check(wrong)
    with pytest.raises(AssertionError):
        check(wrong, exact_values=True)


def test_exact_cases_are_exact():
    """Most exact cases are judged to the last bit, gradients included."""
    judged = total = 0
    for number in range(300):
        case = fuzz.case(0, number)
        if not case.exact or case.dtype == torch.float64:
            continue
        call = case.call()
        arguments = (call.op, call.arguments, call.differentiable, call.cotangents or None)
        truth, plain = oracle.exact(*arguments), oracle.plain(*arguments)
        for kind in ("results", "gradients"):
            for name, value in getattr(plain, kind).items():
                total += 1
                judged += torch.equal(value, getattr(truth, kind)[name].to(value.dtype))
    assert judged > 0.9 * total


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_plain_version_of_matrix_products(dtype, monkeypatch):
    """Where operands are rounded, errors are a few of their last places, in states too."""
    call = cases.Ssd(dtype=dtype, seqlen=70).call()
    question = (call.op, call.arguments, call.differentiable, call.cotangents)
    truth, fine = oracle.exact(*question), oracle.plain(*question)
    eps = torch.finfo(dtype).eps
    monkeypatch.setattr(oracle, "products_eps", lambda op, arguments: eps)
    coarse = oracle.plain(*question, truth=truth)
    for kind, name in (("results", "final_states"), ("gradients", "A"), ("gradients", "D")):
        exact = getattr(truth, kind)[name]
        error, small = ((getattr(o, kind)[name] - exact).abs().max() for o in (coarse, fine))
        assert small < 0.01 * eps * exact.abs().max()
        assert 0.1 * eps * exact.abs().max() < error < 4 * eps * exact.abs().max()
    call.arguments["x"].zero_()  # what is 0 stays 0
    call.arguments["initial_states"].zero_()
    assert (oracle.plain(call.op, call.arguments).results["final_states"] == 0).all()


# Poison ------------------------------------------------------------------------------------------


def test_poisoned_memory(device):
    for make in (torch.empty, lambda *a, **k: torch.zeros(1, device=device).new_empty(*a, **k)):
        with poison.poisoned_memory():
            for dtype in cases.FLOATS:
                assert make((5, 7), dtype=dtype, device=device).isnan().all()
            assert (make((64,), dtype=torch.uint8, device=device) == 255).all()
            assert torch.empty_like(torch.zeros(4, 3, device=device).t()).isnan().all()
            assert torch.empty_strided((4, 3), (1, 4), device=device).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("layout", poison.LAYOUTS)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 3, 4), (2, 1, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64])
def test_arena(layout, shape, dtype, device):
    values = torch.ones(shape, dtype=dtype)
    arena = poison.Arena(device)
    view = arena.place("x", values, layout)
    assert torch.equal(view.cpu(), values)
    arena.check()
    if view.numel() and layout not in poison.OVERLAPPING:
        view.mul_(2)
        arena.check(mutable=("x",))
        with pytest.raises(AssertionError):
            arena.check()
    arena.restore()
    arena.check()
    for outside in (-1, 60):  # elements from the start of the view
        view.as_strided((1,), (1,), view.storage_offset() + outside).fill_(7)
        with pytest.raises(AssertionError):
            arena.check()
        arena.restore()
