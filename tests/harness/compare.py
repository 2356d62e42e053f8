"""How close is close enough, and everything that one call must satisfy.

The 2x rule: the largest and the root-mean-square error of a result against float64 may each be at
most twice those of a plain PyTorch version of the same precision, plus a floor, below which an
error says nothing: the rounding of the result to its type, and what the truth moves when the
arguments are off by their last place (sums that cancel).
"""

import collections

import torch

from . import oracle, poison

# Rounding of a result to its type, in units of the last place of its largest element: a constant
# and, where the type is also that of the sums, a multiple of the root of the number of terms. Types
# of 16 bits are summed in float32.
_ROUNDING = {
    torch.float16: (0.5, 0),
    torch.bfloat16: (0.5, 0),
    torch.float32: (2, 0.5),
    torch.float64: (128, 32),  # no wider type judges it, nor knows what cancels on the way
}
# Times what the truth moves under blurred arguments: a constant, and more where that is known from
# few elements, any of which may have moved little by chance.
_BLUR = (4, 16)

Ratio = collections.namedtuple("Ratio", "op result dtype largest rms")
ratios = []  # of errors to those of the plain version, for results large enough to compare


def _as_real(tensor):
    tensor = tensor.detach().cpu()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def check_close(op, name, actual, exact, plain, blurred, terms=1, note="", exact_values=False):
    """Asserts that `actual` obeys the 2x rule, or with exact_values equals the rounded truth.

    exact, plain, blurred: the same result from oracle.py; terms: of the longest sum in it.
    """
    where = f"{op}: {name}"
    assert actual is not None, f"{where} is missing\n  {note}"
    assert actual.shape == plain.shape, (
        f"{where} has shape {tuple(actual.shape)}, expected {tuple(plain.shape)}\n  {note}"
    )
    assert actual.dtype == plain.dtype, f"{where} is {actual.dtype}, not {plain.dtype}\n  {note}"
    if actual.numel() == 0:
        return
    actual, exact, plain, blurred = map(_as_real, (actual, exact, plain, blurred))
    dtype = actual.dtype

    if exact_values and dtype != torch.float64:
        rounded = exact.to(dtype)
        if torch.equal(plain, rounded):  # the plain version proves that no sum was rounded
            wrong = actual != rounded
            assert not wrong.any(), _report(where, "not exact", actual, rounded, wrong, note)
            return

    assert torch.isfinite(exact).all(), f"the case overflows float64\n  {note}"
    representable = torch.isfinite(exact.to(dtype))  # else the rounded truth is infinite
    overflow_agrees = (actual == exact.to(dtype)) | representable
    assert overflow_agrees.all(), _report(
        where, "finite where the truth overflows", actual, exact, ~overflow_agrees, note
    )
    representable &= torch.isfinite(plain)  # beyond that the case asks too much of the type
    actual, exact, plain, blurred = (
        torch.where(representable, t.double(), 0) for t in (actual, exact, plain, blurred)
    )
    not_finite = ~torch.isfinite(actual)
    assert not not_finite.any(), _report(where, "not finite", actual, exact, not_finite, note)

    constant, growing = _ROUNDING[dtype]
    ulp = torch.finfo(dtype).eps * (constant + growing * terms**0.5)
    blur = _BLUR[0] + _BLUR[1] / actual.numel()
    error, plain_error, moved = ((t - exact).abs() for t in (actual, plain, blurred))
    for statistic, of in (("largest", torch.max), ("rms", lambda t: t.square().mean().sqrt())):
        floor = ulp * of(exact.abs()).item() + blur * of(moved).item() + torch.finfo(dtype).tiny
        floor += 4 * terms * torch.finfo(torch.float32).tiny  # a sum of numbers that count as 0
        if dtype == torch.float16:
            floor += 2.0**-24  # the smallest step of its subnormal numbers
        found, allowed = of(error).item(), 2 * of(plain_error).item() + floor
        assert found <= allowed, _report(
            where,
            f"{statistic} error {found:.3g}, allowed {allowed:.3g} "
            f"(plain version {of(plain_error).item():.3g}, floor {floor:.3g})",
            actual,
            exact,
            error >= error.max() / 4,
            note,
        )
    if plain_error.max() > 0 and plain_error.numel() >= 64:
        ratios.append(
            Ratio(
                op,
                name,
                str(dtype).removeprefix("torch."),
                (error.max() / plain_error.max()).item(),
                (error.norm() / plain_error.norm()).item(),
            )
        )


def _report(where, what, actual, expected, wrong, note):
    places = wrong.nonzero()
    lines = [f"{where}: {what}; {len(places)} of {actual.numel()} elements, for example"]
    for place in places[:5].tolist():
        a, e = actual[tuple(place)].item(), expected[tuple(place)].item()
        lines.append(f"  at {tuple(place)}: got {a!r}, expected {e!r}")
    return "\n".join([*lines, f"  {note}"])


def longest_sum(argument):
    """A bound for the terms of a sum over one axis, or over rows and time (last, or 2nd of 4)."""
    shape = argument.shape
    if not shape:
        return 1
    rows_and_time = [shape[0] * shape[-1]]
    if len(shape) == 4:
        rows_and_time.append(shape[0] * shape[1])
    return max([*shape, *rows_and_time])


def run(call):
    """Results (with updated states) and gradients of the operation, in poisoned memory."""
    arguments = dict(call.arguments)
    leaves = call.differentiable if call.cotangents else ()
    for name in leaves:
        arguments[name] = arguments[name].detach().requires_grad_()
    with poison.poisoned_memory():
        results = call.invoke(**arguments)
        gradients = {}
        if leaves:
            used = [
                name
                for name, cotangent in call.cotangents.items()
                if cotangent is not None and results[name].requires_grad
            ]
            gradients = torch.autograd.grad(
                [results[name] for name in used],
                [arguments[name] for name in leaves],
                [call.cotangents[name] for name in used],
                allow_unused=True,
            )
            gradients = {
                name: torch.zeros_like(arguments[name]) if g is None else g
                for name, g in zip(leaves, gradients)
            }
    results = {name: r.detach() for name, r in results.items()}
    for name in call.mutable:
        results[name] = call.arguments[name].clone()
    return oracle.Outcome(results, gradients)


def check_same(call, first, second, what):
    """Asserts that two outcomes are the same bit for bit."""
    for kind in ("results", "gradients"):
        for name, value in getattr(first, kind).items():
            assert poison.same_bits(value, getattr(second, kind)[name]), (
                f"{call.op}: {kind} {name} {what}\n  {call.note}"
            )


def judge(call, gradients=True):
    """The outcomes that check_close asks for: exact, plain, blurred."""
    question = [call.op, call.arguments]
    if gradients:
        question += [call.differentiable, call.cotangents or None]
    exact = oracle.exact(*question)
    return exact, oracle.plain(*question, truth=exact), oracle.blurred(*question)


def check_results(call, results, terms=1):
    """The 2x rule for results that came another way than by the call."""
    judges = judge(call, gradients=False)
    for name, result in results.items():
        check_close(
            call.op, name, result, *(j.results[name] for j in judges), terms=terms, note=call.note
        )


def states_eps(dtype, device):
    """The eps of what ssd_chunk_scan adds up in its states, for arguments of a type."""
    wide = torch.promote_types(dtype, torch.float32)
    return torch.finfo(dtype if device == "cuda" else wide).eps


def check_call(call, rerun=True):
    """All that holds for every call: 2x rule, red zones, inputs untouched, repeatable bits."""
    judges = judge(call)
    terms = max([1, *(longest_sum(a) for a in call.arguments.values() if torch.is_tensor(a))])
    outcome = run(call)
    call.arena.check(mutable=call.mutable)
    for name, result in outcome.results.items():
        check_close(
            call.op, name, result, *(j.results[name] for j in judges), terms, call.note, call.exact
        )
    for name, gradient in outcome.gradients.items():
        check_close(
            call.op,
            "gradient of " + name,
            gradient,
            *(j.gradients[name] for j in judges),
            terms,
            call.note,
            call.exact,
        )
    if rerun:
        call.arena.restore()
        check_same(call, outcome, run(call), "differs in a second run")
    return outcome
