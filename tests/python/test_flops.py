"""Formulas for torch's FLOP counter: against counts by hand, by doubling, and whole against parts."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from harness import cases
from harness.registration import NATIVE
from mamba_ssm import Mamba, Mamba2
from test_registry import OPS
from torch.utils.flop_counter import FlopCounterMode, flop_registry

CASES = {
    "causal_conv1d": cases.Conv(batch=2, dim=3, seqlen=5, width=4),
    "selective_scan": cases.Scan(batch=2, dim=3, seqlen=5, dstate=4),
    "selective_scan complex": cases.Scan(batch=2, dim=3, seqlen=5, dstate=4, complex_A=True),
    "ssd_chunk_scan": cases.Ssd(batch=2, seqlen=5, nheads=4, headdim=3, ngroups=2, dstate=4),
}
UPDATES = {
    "causal_conv1d_update": cases.ConvUpdate(batch=2, dim=3, width=4, seqlen=2),
    "selective_state_update": cases.StateUpdate(batch=2, dim=3, dstate=4),
    "selective_state_update heads": cases.StateUpdate(
        batch=2, nheads=4, ngroups=2, dim=3, dstate=4
    ),
}
LINEAR_OF_STEP = cases.DecodeLinear(rows=3, in_features=8, out_features=5)
NOTHING = {
    "causal_conv1d_varlen_states": cases.VarlenStates(),
    "rms_norm_gated": cases.NormGated(),
    "layer_norm": cases.LayerNorm(),
}
INNER = {
    "mamba_inner": cases.Inner(),
    "mamba_inner complex": cases.Inner(complex_A=True),
    "mamba2_inner": cases.Inner2(),
    "mamba2_inner MLP": cases.Inner2(d_nonssm=3),
    "mamba2_inner alone": cases.Inner2(d_model=None, out_bias=False),
}


class Count:
    """Sums of products of numbers that do not matter: a product and its addition are two."""

    flops = 0

    def dot(self, *products):
        self.flops += 2 * len(products)


def counted(case, device, backward=False):
    call = case.call(device)
    if not backward:
        with torch.no_grad(), FlopCounterMode(display=False) as mode:
            call.invoke()
        return mode.get_total_flops()
    for name in call.differentiable:
        call.arguments[name].requires_grad_()
    results = call.invoke().values()
    with FlopCounterMode(display=False) as mode:
        sum(r.abs().sum() for r in results).backward()
    return mode.get_total_flops()


def convolution_by_hand(case):
    count = Count()
    for _ in range(case.batch * case.dim * (case.seqlen or 1)):
        count.dot(*["w x"] * case.width)
    return count.flops


def scan_by_hand(elements, dstate, is_complex=False):
    """The forward and the backward of `elements` tokens of a channel."""
    forward, backward = Count(), Count()
    for _ in range(elements):
        if is_complex:
            for _ in range(dstate):
                forward.dot("re a re h", "- im a im h", "b re B")
                forward.dot("re a im h", "im a re h", "b im B")
            forward.dot(*["re C re h", "- im C im h"] * dstate)
            continue
        for _ in range(dstate):
            forward.dot("a h", "b B")
            backward.dot("a g", "C dy")
            backward.dot("g h")  # da
            backward.dot("g b")  # dB
            backward.dot("dy h")  # dC
        forward.dot(*["C h"] * dstate)
        backward.dot(*["g B"] * dstate)  # db
    return forward.flops, backward.flops


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_formula(op):
    assert getattr(torch.ops.mamba_ssm, op) in flop_registry


def test_convolutions(device):
    case, update = CASES["causal_conv1d"], UPDATES["causal_conv1d_update"]
    assert counted(case, device) == convolution_by_hand(case)
    assert counted(update, device) == convolution_by_hand(update)
    x = torch.randn(case.batch, case.dim, case.seqlen + case.width - 1, device=device)
    weight = torch.randn(case.dim, 1, case.width, device=device)
    with FlopCounterMode(display=False) as mode:  # torch's own formula
        torch.conv1d(x, weight, groups=case.dim)
    assert counted(case, device) == mode.get_total_flops()
    # As many products make dx, and as many dweight.
    assert counted(case, device, backward=True) == 2 * convolution_by_hand(case)


def test_scans(device):
    forward, backward = scan_by_hand(2 * 3 * 5, 4)
    assert counted(CASES["selective_scan"], device) == forward
    assert counted(CASES["selective_scan"], device, backward=True) == backward
    forward, _ = scan_by_hand(2 * 3 * 5, 4, is_complex=True)
    assert counted(CASES["selective_scan complex"], device) == forward
    assert counted(CASES["selective_scan complex"], device, backward=True) == 2 * forward
    forward, backward = scan_by_hand(2 * 5 * 4 * 3, 4)
    assert counted(CASES["ssd_chunk_scan"], device) == forward
    assert counted(CASES["ssd_chunk_scan"], device, backward=True) == backward
    assert counted(UPDATES["selective_state_update"], device) == scan_by_hand(2 * 3, 4)[0]
    assert counted(UPDATES["selective_state_update heads"], device) == scan_by_hand(2 * 4 * 3, 4)[0]


def test_linear_of_a_step(device):
    case = LINEAR_OF_STEP
    assert counted(case, device) == 2 * case.rows * case.in_features * case.out_features
    x, weight = (case.call(device).arguments[name] for name in ("x", "weight"))
    with FlopCounterMode(display=False) as mode:
        torch.ops.mamba_ssm.step_linear(x, weight)
    assert mode.get_total_flops() == counted(case, device)


@pytest.mark.parametrize("case", NOTHING.values(), ids=NOTHING.keys())
def test_nothing(case, device):
    assert counted(case, device) == 0


LINEAR = [
    (case, field)
    for case in (*CASES.values(), *UPDATES.values(), *INNER.values())
    for field in ("batch", "seqlen", "dim", "nheads", "dstate", "width", "d_model")
    if getattr(case, field, None) is not None
    # A projection or a convolution does not depend on these.
    and not (isinstance(case, (cases.Inner, cases.Inner2)) and field not in ("batch", "seqlen"))
]


@pytest.mark.parametrize("case, field", LINEAR, ids=lambda v: getattr(v, "op", v))
def test_doubling(case, field, device):
    """Twice the batch, the tokens, the channels, the states, the taps: twice the count."""
    double = dataclasses.replace(case, **{field: 2 * getattr(case, field)})
    assert counted(double, device) == 2 * counted(case, device)


@pytest.mark.parametrize("case", INNER.values(), ids=INNER.keys())
def test_composites_are_their_parts(case, device):
    """Under inference mode the counter sees one op, else what it is made of."""
    call = case.call(device)
    with torch.inference_mode(), FlopCounterMode(display=False) as whole:
        call.invoke()
    assert list(whole.get_flop_counts()["Global"]) == [getattr(torch.ops.mamba_ssm, case.op)]
    assert whole.get_total_flops() == counted(case, device) > 0


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_modules(kind, device):
    """A block is its projections, convolution and recurrence; its backward twice that, and again
    what the forward did not keep."""
    options = {"headdim": 4} if kind is Mamba2 else {}
    block = kind(16, d_state=4, device=device, **options)
    tokens = 2 * 10
    matrices = [p.numel() for n, p in block.named_parameters() if n.endswith("proj.weight")]
    convolution = 2 * tokens * block.conv1d.weight.numel()
    scan = 6 * tokens * block.d_inner * block.d_state
    forward = 2 * tokens * sum(matrices) + convolution + scan
    x = torch.randn(2, 10, 16, device=device, requires_grad=True)
    with FlopCounterMode(display=False) as mode:
        y = block(x)
        assert mode.get_total_flops() == forward
        y.sum().backward()
    again = convolution if NATIVE else 0
    if NATIVE and kind is Mamba:
        again += 2 * tokens * block.dt_proj.weight.numel()
    assert mode.get_total_flops() == 3 * forward + again


def test_import_leaves_the_counter_alone():
    program = (
        "import sys, mamba_ssm, torch\n"
        "assert 'torch.utils.flop_counter' not in sys.modules\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.mamba_ssm.selective_scan in flop_registry\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
