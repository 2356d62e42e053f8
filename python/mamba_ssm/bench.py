"""Times the operations on this machine, beside recorded or measured times of other packages.

On a GPU, rows have the recorded times of the package that this one replaces beside them; compare
them only on the GPU that the record names. On a CPU, the others run in the same process.
"""

import copy
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from mamba_ssm import Mamba, Mamba2
from mamba_ssm._command import ArgumentError
from mamba_ssm.bench_workload import (
    parallel_scan,
    scan_inputs,
    ssd_dense_chunks,
    ssd_inputs,
    time_loop,
)
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
from mamba_ssm.ops.triton.layer_norm import rms_norm_fn
from mamba_ssm.ops.triton.layer_norm import rms_norm_ref as add_rms_norm_ref
from mamba_ssm.ops.triton.layernorm_gated import rms_norm_ref, rmsnorm_fn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from mamba_ssm.utils.generation import InferenceParams

ops = torch.ops.mamba_ssm
PEER = json.loads((Path(__file__).parent / "bench_peer.json").read_text(encoding="utf-8"))
FLUSH_BYTES = 1 << 28  # larger than any L2 cache
CHECKED_DIM, CHECKED_SEQLEN = 64, 512  # part of a call that is compared with float64
CHECKED_ROWS = 64
CHECKED_HEADS = 8  # the gradient of A is one number for each: that of a single one may cancel
SSD_CHUNK = 256  # what callers pass; the kernels have their own

EPILOG = """\
examples:
  mamba-ssm bench                             all groups of this machine's kind, CPU or GPU
  mamba-ssm bench scan ssd --json rows.json   two of a GPU's groups, and the rows as JSON
"""


def add_arguments(parser):
    parser.add_argument(
        "groups",
        nargs="*",
        metavar="group",
        help=f"{', '.join(GROUPS)} (default: cpu without a GPU, all others with one)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")


def run(args):
    gpu = torch.cuda.is_available()
    groups = args.groups or [name for name in GROUPS if (name == "cpu") != gpu]
    unknown = [name for name in groups if name not in GROUPS]
    if unknown:
        raise ArgumentError(f"unknown group {unknown[0]!r}; there are {', '.join(GROUPS)}")
    if not gpu and any(name != "cpu" for name in groups):
        raise ArgumentError("torch sees no GPU; on the CPU there is the group cpu")
    torch.manual_seed(0)
    report = Report()
    if gpu and any(name != "cpu" for name in groups):
        report.gpu_header()
    for name in groups:
        GROUPS[name](report)
    if args.json:
        args.json.write_text(json.dumps(report.rows, indent=1) + "\n", encoding="utf-8")
    return 0


class Report:
    """Prints rows as they come and keeps them."""

    def __init__(self):
        self.rows = []
        self.copy_rate = None  # GB/s of a large copy in this run

    def gpu_header(self):
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        print(f"peer: {PEER['source']}, {PEER['gpu']}, torch {PEER['torch']}, {PEER['date']}")
        x = torch.empty(1 << 29, device="cuda")
        y = torch.empty_like(x)
        self.copy_rate = moved(x, y) / gpu_ms(lambda: y.copy_(x))
        print(f"copy rate of this run: {self.copy_rate:.0f} GB/s\n")
        print(
            f"{'name':<48}{'ms':>10}{'peer ms':>10}{'peer/ms':>9}{'GB/s':>8}{'of copy':>9}"
            f"{'error':>10}"
        )

    def gpu_row(self, name, ms, gigabytes=None, error=None):
        """gigabytes: inputs and outputs once, in units of 1e6 bytes per millisecond."""
        peer = PEER["ms"].get(name)
        rate = gigabytes and gigabytes / ms
        cells = [
            f"{ms:10.5f}",
            f"{peer:10.5f}" if peer else f"{'-':>10}",
            f"{peer / ms:9.2f}" if peer else f"{'-':>9}",
            f"{rate:8.0f}" if rate else f"{'-':>8}",
            f"{rate / self.copy_rate:9.2f}" if rate else f"{'-':>9}",
            f"{error:10.1e}" if error is not None else f"{'-':>10}",
        ]
        print(f"{name:<48}{''.join(cells)}", flush=True)
        self.rows.append(dict(name=name, ms=ms, peer_ms=peer, gb_per_s=rate, error=error))

    def cpu_row(self, name, ms, other=None, other_ms=None):
        beside = f"{other_ms:12.1f}  {other_ms / ms:6.1f}x  {other}" if other else ""
        print(f"{name:<48}{ms:10.2f}{beside}", flush=True)
        self.rows.append(dict(name=name, ms=ms, other=other, other_ms=other_ms))


def moved(*tensors):
    """Bytes of the tensors, in millions."""
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def gpu_ms(call, budget_ms=150):
    """Median time of call() with a cold L2 cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def events(count):
        pairs = []
        for _ in range(count):
            flush.zero_()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs)

    call()
    estimate = events(5)
    return events(min(1000, max(5, int(budget_ms / estimate))))


def graph_ms(call, calls=20):
    """Median time of call() within a CUDA graph of several, which hides the launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return gpu_ms(graph.replay) / calls


def relative_error(value, exact):
    """Root mean square of value - exact, over that of exact."""
    exact = exact.double()
    scale = exact.norm()
    return ((value.double() - exact).norm() / scale).item() if scale > 0 else 0.0


def first_channels(t):
    """The part of an argument or result that belongs to the first row, channels and tokens."""
    if t.dim() < 3:
        return t[:CHECKED_DIM].contiguous()
    return t[:1, :CHECKED_DIM, :CHECKED_SEQLEN].contiguous()


def first_rows(t):
    """The part of an argument or result (rows, channels) that belongs to the first rows."""
    return t[:CHECKED_ROWS] if t.dim() == 2 else t


def forward_backward(
    report, name, call, reference, inputs, forward_mb, backward_mb, checked_part=first_channels
):
    """Rows for call(*inputs), without gradients, and for its backward.

    The error of the forward is that of the checked part of the timed call, that of the backward the
    largest of all gradients of a call on this alone: reference in float64 both times.
    """
    with torch.no_grad():
        ms = gpu_ms(lambda: call(*inputs))
        part = [checked_part(t) for t in inputs]
        out = checked_part(call(*inputs))
    leaves = [t.clone().requires_grad_() for t in part]
    exact_leaves = [t.double().requires_grad_() for t in part]
    exact = reference(*exact_leaves)
    report.gpu_row(f"{name}/fwd_nograd", ms, forward_mb, relative_error(out, exact))

    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(call(*leaves), leaves, dout)
    exact_gradients = torch.autograd.grad(exact, exact_leaves, dout.double())
    error = max(relative_error(g, e) for g, e in zip(gradients, exact_gradients))

    inputs = [t.detach().requires_grad_() for t in inputs]
    out = call(*inputs)
    dout = torch.randn_like(out)
    ms = gpu_ms(lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True))
    report.gpu_row(f"{name}/bwd", ms, backward_mb, error)


def limits(report):
    x = torch.randn(1 << 30, device="cuda")
    y = torch.empty_like(x)
    report.gpu_row("limit/copy_4GiB", gpu_ms(lambda: y.copy_(x)), moved(x, y))
    del x, y
    x, y = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    report.gpu_row("limit/gemm_bf16_8192", gpu_ms(lambda: x @ y))
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    report.gpu_row("limit/exp_fp32_2^28", gpu_ms(lambda: torch.exp(x, out=y)), moved(x, y))


def conv(report):
    def call(x, weight, bias):
        return ops.causal_conv1d(x, weight, bias, silu=True)[0]

    def reference(x, weight, bias):
        dim, width = weight.shape
        padded = F.pad(x, (width - 1, 0))
        return F.silu(F.conv1d(padded, weight[:, None], bias, groups=dim))

    sizes = [(8, 1536, 2048), (8, 4096, 2048), (2, 5120, 8192), (1, 4096, 65536)]
    for (batch, dim, seqlen), layout in itertools.product(sizes, ("BDL", "BLD")):
        x = torch.randn(batch, dim, seqlen, device="cuda", dtype=torch.bfloat16)
        if layout == "BLD":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        inputs = x, torch.randn(dim, 4, device="cuda"), torch.randn(dim, device="cuda")
        name = f"conv1d/{layout}/B{batch}D{dim}L{seqlen}"
        forward_backward(report, name, call, reference, inputs, 2 * moved(x), 3 * moved(x))


def scan(report):
    def call(*inputs):
        return selective_scan_fn(*inputs, delta_softplus=True)

    def reference(*inputs):
        return selective_scan_ref(*inputs, delta_softplus=True)

    sizes = [(8, 1536, 2048, 16), (8, 4096, 2048, 16), (2, 5120, 8192, 16), (1, 4096, 65536, 16)]
    sizes += [(1, 1536, 2048, 16), (8, 1536, 2048, 64)]
    for batch, dim, seqlen, dstate in sizes:
        inputs = scan_inputs(batch, dim, seqlen, dstate, "cuda", torch.bfloat16)
        u, _, _, B, C, *_ = inputs
        forward_backward(
            report,
            f"selective_scan/B{batch}D{dim}L{seqlen}N{dstate}",
            call,
            reference,
            inputs,
            4 * moved(u) + moved(B, C),
            7 * moved(u) + 2 * moved(B, C),
        )


def ssd(report):
    def call(*inputs):
        x, dt, A, B, C, D = inputs
        return mamba_chunk_scan_combined(x, dt, A, B, C, SSD_CHUNK, D=D)

    def reference(*inputs):
        return ssd_dense_chunks(*inputs, chunk_size=64)

    sizes = [(8, 2048, 24, 1, 128), (8, 2048, 80, 1, 128), (2, 8192, 80, 1, 128)]
    sizes += [(1, 65536, 80, 1, 128), (4, 4096, 128, 8, 128), (8, 2048, 80, 1, 64)]
    for batch, seqlen, nheads, ngroups, dstate in sizes:
        headdim = 64
        size = batch, seqlen, nheads, headdim, ngroups, dstate
        inputs = ssd_inputs(*size, "cuda", torch.bfloat16)
        x, dt, _, B, C, _ = inputs
        heads = min(CHECKED_HEADS, nheads // ngroups)

        def first_heads(t):
            """What belongs to the first row and tokens, and to heads of the first group."""
            if t.dim() == 1:
                return t[:heads]
            return t[:1, :CHECKED_SEQLEN, : 1 if t.shape[2] == ngroups else heads].contiguous()

        forward_backward(
            report,
            f"ssd/B{batch}L{seqlen}H{nheads}P{headdim}G{ngroups}N{dstate}",
            call,
            reference,
            inputs,
            2 * moved(x) + moved(dt, B, C),
            3 * moved(x) + 2 * moved(dt, B, C),
            first_heads,
        )


def decode(report):
    dim, width = 5120, 4
    options = dict(device="cuda", dtype=torch.bfloat16)
    for batch in (1, 64, 512):
        x = torch.randn(batch, dim, **options)
        state = torch.randn(batch, dim, width, **options)
        weight, bias = torch.randn(dim, width, **options), torch.randn(dim, **options)
        columns = torch.cat([state[..., 1:], x[..., None]], dim=-1).double()
        exact = F.silu((columns * weight.double()).sum(-1) + bias.double())
        out = ops.causal_conv1d_update(x, state.clone(), weight, bias, silu=True)
        ms = graph_ms(lambda: ops.causal_conv1d_update(x, state, weight, bias, silu=True))
        traffic = 2 * moved(x, state) + moved(weight, bias)
        report.gpu_row(f"conv1d_update/B{batch}D{dim}", ms, traffic, relative_error(out, exact))
    for batch in (1, 64, 512):
        dstate = 16
        state = torch.randn(batch, dim, dstate, device="cuda")
        A = -torch.rand(dim, dstate, device="cuda") - 1
        x, dt, z = (torch.randn(batch, dim, **options) for _ in range(3))
        B, C = (torch.randn(batch, dstate, **options) for _ in range(2))
        D, dt_bias = torch.randn(dim, device="cuda"), torch.rand(dim, device="cuda")
        inputs = state, x, dt, A, B, C, D, z, dt_bias
        state_update_row(report, f"mamba1/B{batch}D{dim}N{dstate}", *inputs)
    for batch, (name, dtype) in itertools.product(
        (1, 64, 512), dict(f32state=torch.float32, bf16state=torch.bfloat16).items()
    ):
        nheads, headdim, dstate = 80, 64, 128
        state = torch.randn(batch, nheads, headdim, dstate, device="cuda", dtype=dtype)
        A = (-torch.rand(nheads, device="cuda") - 1)[:, None, None].expand(-1, headdim, dstate)
        x, z = (torch.randn(batch, nheads, headdim, **options) for _ in range(2))
        dt = torch.randn(batch, nheads, 1, **options).expand(-1, -1, headdim)
        B, C = (torch.randn(batch, 1, dstate, **options) for _ in range(2))
        D, dt_bias = (torch.rand(nheads, 1, device="cuda").expand(-1, headdim) for _ in range(2))
        inputs = state, x, dt, A, B, C, D, z, dt_bias
        size = f"B{batch}H{nheads}P{headdim}N{dstate}"
        state_update_row(report, f"mamba2/{name}/{size}", *inputs)


def state_update_row(report, name, state, *inputs):
    """A row for selective_state_update; the error is that of the first batch row."""
    exact = state_update_reference(state, *inputs)
    out = ops.selective_state_update(state.clone(), *inputs, dt_softplus=True)
    ms = graph_ms(lambda: ops.selective_state_update(state, *inputs, dt_softplus=True))
    x, *others = inputs
    read = sum(t.untyped_storage().nbytes() for t in others) / 1e6  # A, D, dt may be expanded
    traffic = 2 * moved(state) + moved(out, x) + read
    report.gpu_row(f"state_update/{name}", ms, traffic, relative_error(out[0], exact))


def state_update_reference(state, x, dt, A, B, C, D, z, dt_bias):
    """One step of the first batch row in float64."""
    state, x, dt, B, C, z = (t[0].double() for t in (state, x, dt, B, C, z))
    d = F.softplus(dt + dt_bias)
    state = torch.exp(d[..., None] * A) * state + (d * x)[..., None] * B
    return ((state * C).sum(-1) + D * x) * F.silu(z)


def norm(report):
    def call(x, weight, z):
        return rmsnorm_fn(x, weight, None, z=z, eps=1e-5, norm_before_gate=False)

    def reference(x, weight, z):
        return rms_norm_ref(x, weight, None, z=z, eps=1e-5, norm_before_gate=False)

    for rows, dim in ((16384, 2560), (16384, 5120)):
        size = f"M{rows}D{dim}"
        x, z = torch.randn(2, rows, dim, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(dim, device="cuda")
        forward_backward(
            report,
            f"gated_rmsnorm/{size}",
            call,
            reference,
            (x, weight, z),
            3 * moved(x),
            5 * moved(x),
            first_rows,
        )
        residual = torch.randn(rows, dim, device="cuda")
        options = dict(residual=residual, prenorm=True)
        with torch.no_grad():
            ms = gpu_ms(lambda: rms_norm_fn(x, weight, None, residual_in_fp32=True, **options))
            results = rms_norm_fn(x, weight, None, residual_in_fp32=True, **options)
            part, residual_part = first_rows(x).double(), first_rows(residual).double()
            exact = add_rms_norm_ref(
                part, weight.double(), None, residual=residual_part, prenorm=True
            )
        error = max(relative_error(first_rows(r), e) for r, e in zip(results, exact))
        name = f"add_rmsnorm_prenorm/{size}/fwd_nograd"
        report.gpu_row(name, ms, 2 * moved(x, residual), error)


def block(report):
    sizes = [(Mamba, 768, 8, 2048), (Mamba, 2560, 4, 2048)]
    sizes += [(Mamba2, 768, 8, 2048), (Mamba2, 2560, 4, 2048), (Mamba2, 2560, 1, 32768)]
    for kind, d_model, batch, seqlen in sizes:
        module = kind(d_model, device="cuda", dtype=torch.bfloat16)
        exact_module = copy.deepcopy(module).double()
        x = torch.randn(batch, seqlen, d_model, device="cuda", dtype=torch.bfloat16)
        name = f"block/{kind.__name__}/d{d_model}B{batch}L{seqlen}"
        part = x[:1, :CHECKED_SEQLEN]
        with torch.no_grad():
            ms = gpu_ms(lambda: module(x))
            error = relative_error(module(part), exact_module(part.double()))
        report.gpu_row(f"{name}/fwd_nograd", ms, error=error)

        leaves = [x.requires_grad_(), *module.parameters()]
        out = module(x)
        dout = torch.randn_like(out)
        ms = gpu_ms(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
        report.gpu_row(f"{name}/bwd", ms)


def language_model(report):
    """Prompts and greedy generation of 100 tokens after 100, as called, with random weights."""
    sizes = [("130m", 768, 24, "Mamba1"), ("130m", 768, 24, "Mamba2")]
    sizes += [("2.8b", 2560, 64, "Mamba1"), ("2.7b", 2560, 64, "Mamba2")]
    for size, d_model, n_layer, layer in sizes:
        config = MambaConfig(d_model, n_layer=n_layer, vocab_size=50277, ssm_cfg=dict(layer=layer))
        model = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16).eval()
        name = f"lm/{layer.lower()}-{size}"
        prompts = torch.randint(1, 1000, (4, 2048), device="cuda")
        with torch.no_grad():
            ms = gpu_ms(lambda: model(prompts, num_last_tokens=1).logits)
        report.gpu_row(f"{name}/prefill_B4L2048", ms)
        for batch in (1, 64):
            prompts = torch.randint(1, 1000, (batch, 100), device="cuda")

            def generate():
                model.generate(prompts, max_length=200, top_k=1, cg=True)
                torch.cuda.synchronize()

            generate()  # captures the graph
            times = []
            for _ in range(3):
                begin = time.perf_counter()
                generate()
                times.append(1e3 * (time.perf_counter() - begin))
            report.gpu_row(f"{name}/generate_B{batch}_100+100", statistics.median(times))
        print(f"{name}: {launches_of_step(model)} kernels in a decode step of {n_layer} layers")


def launches_of_step(model):
    """CUDA kernels that one token of one row takes."""
    params = InferenceParams(max_seqlen=3, max_batch_size=1)
    token = torch.ones(1, 1, dtype=torch.long, device="cuda")
    with torch.no_grad():
        for _ in range(2):  # the first call makes the cache and fills it
            with torch.profiler.profile() as profile:
                model(token, inference_params=params)
                torch.cuda.synchronize()
            params.seqlen_offset += 1
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels)


def compiled(report):
    """Forward and backward of a Mamba-2 block, in eager mode and by torch.compile in two modes."""
    for d_model, batch, seqlen in ((768, 8, 2048), (2560, 4, 2048)):
        module = Mamba2(d_model, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(batch, seqlen, d_model, device="cuda", dtype=torch.bfloat16)
        leaves = [x.requires_grad_(), *module.parameters()]
        dout = torch.randn_like(x)
        calls = {
            "eager": module,
            "compiled": torch.compile(module),
            "compiled, reduce-overhead": torch.compile(module, mode="reduce-overhead"),
        }
        for name, call in calls.items():
            ms = gpu_ms(lambda: torch.autograd.grad(call(x), leaves, dout))
            report.gpu_row(f"compile/Mamba2/d{d_model}B{batch}L{seqlen}/{name}", ms)


def cpu_ms(call, budget_s=2.0):
    """Shortest time of call(): other work on the machine only ever adds."""
    call()
    times = []
    start = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - start < budget_s and len(times) < 100):
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times)


def cpu(report):
    threads = torch.get_num_threads()
    thread_counts = sorted({1, threads})
    print(f"CPU {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, float32")
    print(f"{'name':<48}{'ms':>10}{'other ms':>12}")
    try:
        from mambapy.pscan import pscan
    except ImportError:
        pscan = None
        print("mambapy is not installed: its parallel scan is left out")
    dim, dstate = 1024, 16

    def inputs_of(seqlen):
        return scan_inputs(1, dim, seqlen, dstate, "cpu", torch.float32)

    def forward(inputs):
        with torch.no_grad():
            selective_scan_fn(*inputs, delta_softplus=True)

    def backward(scan, inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        torch.autograd.grad(scan(*leaves).sum(), leaves)

    inputs = inputs_of(2048)
    size = f"D{dim}L2048N{dstate}"
    try:
        for count in thread_counts:
            torch.set_num_threads(count)
            ms = cpu_ms(lambda: forward(inputs))
            with torch.no_grad():
                loop = cpu_ms(lambda: time_loop(*inputs))
            name = f"selective_scan/{size}/fwd/threads{count}"
            report.cpu_row(name, ms, "PyTorch time loop", loop)
            ms = cpu_ms(
                lambda: backward(lambda *t: selective_scan_fn(*t, delta_softplus=True), inputs)
            )
            name = f"selective_scan/{size}/fwd+bwd/threads{count}"
            if pscan is None:
                report.cpu_row(name, ms)
            else:
                other = cpu_ms(lambda: backward(lambda *t: parallel_scan(pscan, *t), inputs))
                report.cpu_row(name, ms, "mambapy parallel scan", other)
        for seqlen, count in itertools.product((512, 1024, 4096, 8192), thread_counts):
            torch.set_num_threads(count)
            inputs = inputs_of(seqlen)
            name = f"selective_scan/D{dim}L{seqlen}N{dstate}/fwd/threads{count}"
            report.cpu_row(name, cpu_ms(lambda: forward(inputs)))
        for size in ((1, 1024, 16, 64, 1, 128), (2, 2048, 24, 64, 1, 128)):
            for count in thread_counts:
                torch.set_num_threads(count)
                cpu_ssd(report, size, count)
    finally:
        torch.set_num_threads(threads)


def cpu_ssd(report, size, threads):
    """SSD beside the best of three sizes of dense chunks; bfloat16 without a rival."""
    batch, seqlen, nheads, headdim, _, dstate = size
    name = f"ssd/B{batch}L{seqlen}H{nheads}P{headdim}N{dstate}"
    inputs = ssd_inputs(*size, "cpu", torch.float32)

    def ours(*inputs):
        x, dt, A, B, C, D = inputs
        return mamba_chunk_scan_combined(x, dt, A, B, C, SSD_CHUNK, D=D)

    def forward(call, inputs):
        with torch.no_grad():
            call(*inputs)

    def backward(call, inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = call(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    for kind, run_once in (("fwd", forward), ("fwd+bwd", backward)):
        rivals = {}
        for chunk_size in (32, 64, 128):

            def rival(*inputs, chunk_size=chunk_size):
                return ssd_dense_chunks(*inputs, chunk_size=chunk_size)

            rivals[chunk_size] = cpu_ms(lambda: run_once(rival, inputs))
        best = min(rivals, key=rivals.get)
        ms = cpu_ms(lambda: run_once(ours, inputs))
        label = f"dense chunks of {best}"
        report.cpu_row(f"{name}/{kind}/threads{threads}", ms, label, rivals[best])
        halves = [t.bfloat16() if t.dim() > 1 else t for t in inputs]
        ms = cpu_ms(lambda: run_once(ours, halves))
        report.cpu_row(f"{name}/{kind}/bfloat16/threads{threads}", ms)


GROUPS = {
    "limits": limits,
    "conv": conv,
    "scan": scan,
    "ssd": ssd,
    "decode": decode,
    "norm": norm,
    "block": block,
    "lm": language_model,
    "compile": compiled,
    "cpu": cpu,
}
