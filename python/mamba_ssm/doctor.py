"""Says what is installed and tests every operation on inputs with known answers."""

import importlib.metadata
import importlib.util
import math
import os
import platform

import torch

import mamba_ssm
from mamba_ssm import _build_info, _installation, _library, _startup

ops = torch.ops.mamba_ssm
KEYS = {
    "CPU": "CPU",
    "CUDA": "CUDA",
    "Meta": "meta",
    "CompositeExplicitAutograd": "composite",
    "Autograd": "autograd",
}  # dispatch keys and what they are called here
TOLERANCE = 1e-5

EPILOG = """\
examples:
  mamba-ssm doctor            versions, libraries, kernels, a self-test of each operation per device
  mamba-ssm doctor --times    how long the import and the first call of generate take as well

The exit code is 1 if a self-test fails, or if other installations of the packages are in the way.
"""


def add_arguments(parser):
    parser.add_argument(
        "--times", action="store_true", help="measure the import and the first call of generate too"
    )


def run(args):
    """Prints the report. Returns 1 if the installation or a self-test is not in order, else 0."""
    print_versions()
    problems = _installation.problems()
    if torch.cuda.is_available() and torch.version.cuda and not _build_info.CUDA_ARCHS:
        problems.append(_installation.without_cuda_kernels(torch.version.cuda))
    for sentence in problems:
        print(f"PROBLEM: {sentence}")
    print_kernels()
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    failures = sum(not passes(device, name, test) for device in devices for name, test in TESTS)
    if args.times:
        print_times(devices)
    print(f"{len(problems)} problems with the installation")
    print(f"{failures} of {len(devices) * len(TESTS)} self-tests failed")
    return 1 if problems or failures else 0


def print_versions():
    def line(name, value):
        print(f"{name:<16}{value}")

    line("mamba_ssm", f"{mamba_ssm.__version__} in {_library.LIBRARY_DIR.parent}")
    line("built for", f"torch {_build_info.TORCH_VERSION}, {cuda_kernels()}")
    for path in (_library.OPS_LIBRARY, _library.LIBRARY):
        loaded = os.path.realpath(path) in torch.ops.loaded_libraries
        line("library", f"{path}{'' if loaded else ' (not loaded)'}")
    line("registration", _library.MODE)
    line("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    line("python", f"{platform.python_version()} on {platform.platform()}")
    capability = torch.backends.cpu.get_cpu_capability()
    line("CPU", f"{capability}, {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        line("GPU", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}")
    if not torch.cuda.is_available():
        line("GPU", "none that torch can use")
    for name in ("mamba_ssm", "causal_conv1d"):
        for owner in sorted(set(importlib.metadata.packages_distributions().get(name, []))):
            line("distribution", f"{owner} {importlib.metadata.version(owner)} has {name}")
    for name in ("causal_conv1d_cuda", "selective_scan_cuda"):
        spec = importlib.util.find_spec(name)
        line("module", f"{name}: {'not installed' if spec is None else spec.origin}")


def cuda_kernels():
    archs = _build_info.CUDA_ARCHS
    return f"CUDA kernels for {archs}" if archs else "no CUDA kernels"


def print_kernels():
    print(f"\n{'operation':<32}" + "".join(f"{title:<11}" for title in KEYS.values()))
    names = torch._C._dispatch_get_all_op_names()
    for name in sorted(name for name in names if name.startswith("mamba_ssm::")):
        has = [torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in KEYS]
        cells = "".join(f"{'yes' if yes else '-':<11}" for yes in has)
        print(f"{name.partition('::')[2]:<32}{cells}")
    print()


def print_times(devices):
    print(f"\nimport mamba_ssm, after torch: {_startup.import_time():.3f} s")
    for device in devices:
        for layer, first, steady in _startup.first_calls(device):
            print(
                f"{device:<6}generate, {layer}: first call {1e3 * first:.1f} ms, then "
                f"{1e3 * steady:.1f} ms"
            )
    print()


def passes(device, name, test):
    try:
        pairs = test(device)
        error = max(relative_error(got, expected) for got, expected in pairs)
    except Exception as exception:  # whatever it is, the report goes on
        print(f"{device:<6}{name:<32}FAILED: {type(exception).__name__}: {exception}")
        return False
    ok = error < TOLERANCE
    print(f"{device:<6}{name:<32}{'ok' if ok else f'FAILED: error {error:.3g}'}")
    return ok


def relative_error(result, expected):
    got = result.detach().double().flatten().tolist()
    scale = max(1.0, *map(abs, expected))
    return max(abs(a - b) for a, b in zip(got, expected, strict=True)) / scale


# Each test calls an operation on one or two channels and returns [(result, expected values), ...],
# the values computed here with Python's floats from the formula of the operation.

X = [0.5, -1.0, 2.0, 0.25]
DOUT = [1.0, -0.5, 0.75, 2.0]
DELTA = [0.1, -0.3, 0.7, 0.2]
B, C, Z = [1.0, -2.0, 0.5, 1.5], [0.3, 0.9, -1.1, 2.0], [0.4, -0.8, 1.2, 0.0]
A, D, BIAS = -0.6, 0.8, 0.25
W0, W1 = -0.4, 1.5  # taps of a convolution of width 2


def silu(x):
    return x / (1 + math.exp(-x))


def softplus(x):
    return math.log1p(math.exp(x))


def convolution(x):
    past = [0.0] + x[:-1]
    return [silu(BIAS + W0 * a + W1 * b) for a, b in zip(past, x)]


def scan(u, delta, B, C, z):
    state, out = 0.0, []
    for t in range(len(u)):
        d = softplus(delta[t] + BIAS)
        state = math.exp(d * A) * state + d * B[t] * u[t]
        out.append((C[t] * state + D * u[t]) * silu(z[t]))
    return out, state


def row(values, device):
    return torch.tensor(values, device=device).view(1, 1, -1)


def test_conv1d(device):
    weight = torch.tensor([[W0, W1]], device=device)
    bias = torch.tensor([BIAS], device=device)
    out, final = ops.causal_conv1d(row(X, device), weight, bias, silu=True)
    return [(out, convolution(X)), (final, X[-1:])]


def test_conv1d_bwd(device):
    x = row(X, device).requires_grad_()
    weight = torch.tensor([[W0, W1]], device=device, requires_grad=True)
    ops.causal_conv1d(x, weight)[0].backward(row(DOUT, device))
    dx = [W1 * a + W0 * b for a, b in zip(DOUT, DOUT[1:] + [0.0])]
    dw = [sum(g * a for g, a in zip(DOUT[1:], X)), sum(g * a for g, a in zip(DOUT, X))]
    return [(x.grad, dx), (weight.grad, dw)]


def test_conv1d_update(device):
    state = row([9.0, X[0]], device)
    weight = torch.tensor([[W0, W1]], device=device)
    bias = torch.tensor([BIAS], device=device)
    out = ops.causal_conv1d_update(row(X[1:], device)[..., 0], state, weight, bias, silu=True)
    return [(out, convolution(X)[1:2]), (state, X[:2])]


def test_conv1d_varlen_states(device):
    x = torch.tensor(X, device=device)[:, None]
    bounds = torch.tensor([0, 1, 4], device=device)
    states = ops.causal_conv1d_varlen_states(x, bounds, 2)
    return [(states, [0.0, X[0], X[2], X[3]])]


def scan_arguments(device):
    u, delta, B_, C_, z = (row(values, device) for values in (X, DELTA, B, C, Z))
    A_ = torch.tensor([[A]], device=device)
    D_, bias = torch.tensor([D], device=device), torch.tensor([BIAS], device=device)
    return u, delta, A_, B_, C_, D_, z, bias


def test_selective_scan(device):
    out, last = ops.selective_scan(*scan_arguments(device), delta_softplus=True)
    expected, state = scan(X, DELTA, B, C, Z)
    return [(out, expected), (last, [state])]


def test_selective_scan_bwd(device):
    # The output is linear in u: the derivative along u is the output for a unit input.
    arguments = scan_arguments(device)
    u = arguments[0].requires_grad_()
    ops.selective_scan(*arguments, delta_softplus=True)[0].backward(row(DOUT, device))
    units = [[float(s == t) for s in range(len(X))] for t in range(len(X))]
    outs = [scan(unit, DELTA, B, C, Z)[0] for unit in units]
    return [(u.grad, [sum(g * o for g, o in zip(DOUT, out)) for out in outs])]


def test_selective_state_update(device):
    u, delta, A_, B_, C_, D_, z, bias = scan_arguments(device)
    state = torch.zeros(1, 1, 1, device=device)
    outs = []
    for t in range(len(X)):
        x, dt, B_t, C_t, z_t = (v[..., t] for v in (u, delta, B_, C_, z))
        outs.append(
            ops.selective_state_update(state, x, dt, A_, B_t, C_t, D_, z_t, bias, dt_softplus=True)
        )
    expected, last = scan(X, DELTA, B, C, Z)
    return [(torch.stack(outs), expected), (state, [last])]


def ssd_arguments(device):
    x, dt, B_, C_, z = (
        torch.tensor(values, device=device)[None, :, None] for values in (X, DELTA, B, C, Z)
    )
    A_, D_, bias = (torch.tensor([value], device=device) for value in (A, D, BIAS))
    return x[..., None], dt, A_, B_[..., None], C_[..., None], D_, z[..., None], bias


def test_ssd_chunk_scan(device):
    out, final = ops.ssd_chunk_scan(*ssd_arguments(device), dt_softplus=True)
    expected, state = scan(X, DELTA, B, C, Z)
    return [(out, expected), (final, [state])]


def test_ssd_chunk_scan_bwd(device):
    # Linear in x, as the selective scan is in u.
    arguments = ssd_arguments(device)
    x = arguments[0].requires_grad_()
    out, _ = ops.ssd_chunk_scan(*arguments, dt_softplus=True)
    out.backward(torch.tensor(DOUT, device=device).view_as(out))
    units = [[float(s == t) for s in range(len(X))] for t in range(len(X))]
    outs = [scan(unit, DELTA, B, C, Z)[0] for unit in units]
    return [(x.grad, [sum(g * o for g, o in zip(DOUT, out)) for out in outs])]


EPS = 1e-5
WEIGHT = [0.7, -1.2, 0.4, 2.0]


def mean(values):
    return sum(values) / len(values)


def rms_norm(x):
    """x over its root mean square, times WEIGHT; and one over the root mean square."""
    scale = 1 / math.sqrt(mean([v * v for v in x]) + EPS)
    return [scale * v * w for v, w in zip(x, WEIGHT)], scale


def rms_norm_gradient(x, dout):
    scale = rms_norm(x)[1]
    weighted = [g * w for g, w in zip(dout, WEIGHT)]
    along = mean([g * v for g, v in zip(weighted, x)]) * scale * scale
    return [scale * (g - v * along) for g, v in zip(weighted, x)]


def vectors(device, *values):
    return [torch.tensor(v, device=device) for v in values]


def test_rms_norm_gated(device):
    x, weight, z = vectors(device, X, WEIGHT, Z)
    out = ops.rms_norm_gated(x, weight, None, z, eps=EPS, norm_before_gate=False)
    return [(out, rms_norm([v * silu(gate) for v, gate in zip(X, Z)])[0])]


def test_rms_norm_gated_bwd(device):
    x, weight, z, dout = vectors(device, X, WEIGHT, Z, DOUT)
    ops.rms_norm_gated(x.requires_grad_(), weight, None, z, eps=EPS).backward(dout)
    return [(x.grad, rms_norm_gradient(X, [g * silu(gate) for g, gate in zip(DOUT, Z)]))]


def test_layer_norm(device):
    x, weight, residual = vectors(device, X, WEIGHT, B)
    options = dict(eps=EPS, prenorm=True, is_rms_norm=True)
    out, _, residual_out = ops.layer_norm(x, weight, residual=residual, **options)
    total = [v + r for v, r in zip(X, B)]
    return [(out, rms_norm(total)[0]), (residual_out, total)]


def test_decode_linear(device):
    x, weight, residual, norm = vectors(device, X, DOUT, B, WEIGHT)
    out, total = ops.decode_linear_prenorm(
        x[None], weight[None], residual=residual[None], norm_weight=norm, eps=EPS
    )
    sums = [v + r for v, r in zip(X, B)]
    expected = sum(n * w for n, w in zip(rms_norm(sums)[0], DOUT))
    return [(out, [expected]), (total, sums)]


def test_layer_norm_bwd(device):
    x, weight, residual, dout = vectors(device, X, WEIGHT, B, DOUT)
    out = ops.layer_norm(x.requires_grad_(), weight, residual=residual, eps=EPS, is_rms_norm=True)
    out[0].backward(dout)
    return [(x.grad, rms_norm_gradient([v + r for v, r in zip(X, B)], DOUT))]


def test_mamba2_inner(device):
    columns = torch.tensor([Z, X, B, C, DELTA], device=device)  # z, x, B, C, dt
    bias, A_, D_ = vectors(device, [BIAS], [A], [D])
    out, final = ops.mamba2_inner(
        columns.T[None],
        torch.tensor([[W0, W1]] * 3, device=device),
        bias.expand(3),
        A_,
        1,
        1,
        D_,
        bias,
    )
    expected, state = scan(convolution(X), DELTA, convolution(B), convolution(C), Z)
    return [(out, expected), (final, [state])]


def test_mamba_inner(device):
    xz = torch.tensor([X, Z], device=device)[None]
    x_proj, dt_proj, out_proj = [0.3, -0.7, 1.1], 0.9, 1.3
    out = ops.mamba_inner(
        xz,
        torch.tensor([[[W0, W1]]], device=device),
        torch.tensor([BIAS], device=device),
        torch.tensor(x_proj, device=device)[:, None],
        torch.tensor([[dt_proj]], device=device),
        torch.tensor([[out_proj]], device=device),
        None,
        torch.tensor([[A]], device=device),
        D=torch.tensor([D], device=device),
        delta_bias=torch.tensor([BIAS], device=device),
        delta_softplus=True,
    )
    x = convolution(X)
    delta, B_, C_ = ([factor * v for v in x] for factor in x_proj)
    expected, _ = scan(x, [dt_proj * v for v in delta], B_, C_, Z)
    return [(out, [out_proj * v for v in expected])]


TESTS = [
    ("causal_conv1d", test_conv1d),
    ("causal_conv1d, backward", test_conv1d_bwd),
    ("causal_conv1d_update", test_conv1d_update),
    ("causal_conv1d_varlen_states", test_conv1d_varlen_states),
    ("selective_scan", test_selective_scan),
    ("selective_scan, backward", test_selective_scan_bwd),
    ("selective_state_update", test_selective_state_update),
    ("ssd_chunk_scan", test_ssd_chunk_scan),
    ("ssd_chunk_scan, backward", test_ssd_chunk_scan_bwd),
    ("rms_norm_gated", test_rms_norm_gated),
    ("rms_norm_gated, backward", test_rms_norm_gated_bwd),
    ("layer_norm", test_layer_norm),
    ("layer_norm, backward", test_layer_norm_bwd),
    ("decode_linear", test_decode_linear),
    ("mamba_inner", test_mamba_inner),
    ("mamba2_inner", test_mamba2_inner),
]
