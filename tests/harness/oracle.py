"""What every operation should return: its definition, walked step by step.

The references know nothing of kernels: one Python loop over time, one row of a batch at a time
where sequences are packed, each packed sequence on its own. They compute in the precision of their
arguments and are differentiable by autograd, which gives two judges from one text:

    exact(...)   float64 inside, nothing rounded: the truth
    plain(...)   float32 inside, arguments and results in their own types: what a careful user would
                 write in PyTorch; its error is the yardstick of the 2x rule

`blurred` is the truth for arguments that are off by the last place of the precision inside: how far
it moves says how much of the truth that precision can know at all.

Matrix products of 16-bit types on a GPU take operands of that type. Where an operation is made of
such products, the plain version of a call on a GPU moves their operands by up to one unit of the
last place: by chance, but equal numbers alike, so that none has a small error by luck; plain(...)
is the worst of several.

An operation that updates a state in place returns the new state among its results here.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F


@dataclasses.dataclass
class Outcome:
    """Results of a call by name, and the gradients of its differentiable arguments by name."""

    results: dict
    gradients: dict


def exact(op, arguments, differentiable=(), cotangents=None):
    return _evaluate(op, arguments, differentiable, cotangents, torch.float64, rounded=False)


def plain(op, arguments, differentiable=(), cotangents=None, truth=None):
    """truth: what exact(...) gives, for calls whose operands are rounded; computed if not given."""
    inside = _precision_inside(arguments)
    if products_eps(op, arguments) == 0:
        return _evaluate(op, arguments, differentiable, cotangents, inside, rounded=True)
    truth = truth or exact(op, arguments, differentiable, cotangents)
    outcomes = []
    for seed in range(8):
        inner = {"products": Products(arguments[PRODUCTS[op]].dtype, seed)}
        outcomes.append(_evaluate(op, arguments, differentiable, cotangents, inside, True, inner))
    return Outcome(
        *(
            {name: _worst(exact, [getattr(o, kind)[name] for o in outcomes]) for name, exact in of}
            for kind, of in (
                ("results", truth.results.items()),
                ("gradients", truth.gradients.items()),
            )
        )
    )


class Products:
    """What rounding does to the operands of matrix products, in steps of `chunk` tokens."""

    chunk = 64

    def __init__(self, dtype, seed):
        self.dtype = dtype
        self.seed = seed

    def _chance(self, value):
        """A number in [-1, 1) for each element: a hash of its digits."""
        digits = (value.float().view(torch.int32).long() + self.seed * 0x9E3779B1) % 2**32
        for _ in range(2):
            digits = (digits ^ digits >> 16) * 0x45D9F3B % 2**32
        return digits / 2**31 - 1

    def _moved(self, value):
        value = value.detach()
        info = torch.finfo(self.dtype)
        _, exponent = torch.frexp(value)
        ulp = torch.ldexp(torch.full_like(value, info.eps), exponent - 1)
        ulp = ulp.clamp_min(info.smallest_normal * info.eps)
        return value + torch.where(value == 0, 0, ulp * self._chance(value))

    def operand(self, value):
        """Moved, and so is its gradient."""
        return self.gradient_operand(value + (self._moved(value) - value.detach()))

    def gradient_operand(self, value):
        """Itself, but its gradient is moved."""
        value = value + 0
        if value.requires_grad:
            value.register_hook(self._moved)
        return value


def _worst(truth, values):
    """In each place the value that is furthest from the truth."""
    worst = values[0]
    for value in values[1:]:
        further = (value.double() - truth).abs() > (worst.double() - truth).abs()
        worst = torch.where(further, value, worst)
    return worst


def products_eps(op, arguments):
    """The eps of the operands of matrix products, where they have fewer digits than the sums."""
    x = arguments[PRODUCTS[op]] if op in PRODUCTS else None
    return torch.finfo(x.dtype).eps if x is not None and x.is_cuda and x.dtype.itemsize == 2 else 0


def blurred(op, arguments, differentiable=(), cotangents=None):
    step = torch.finfo(_precision_inside(arguments)).eps
    if op in COMPOSITES:  # parts hand on rounded sums, which are rounded to their type, too
        step = max(2 * step, torch.finfo(arguments[COMPOSITES[op]].dtype).eps / 2)
    generator = torch.Generator().manual_seed(0)

    def blur(value):
        if not isinstance(value, torch.Tensor) or not (value.is_complex() or _is_real(value)):
            return value
        value = _in_precision(value.cpu(), torch.float64)
        noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
        return value * (1 + step * (2 * noise - 1))

    arguments = {name: blur(value) for name, value in arguments.items()}
    cotangents = cotangents and {name: blur(value) for name, value in cotangents.items()}

    def hand_on(value):  # gradients on their way back, too
        value = blur(value)
        if value.requires_grad:
            value.register_hook(blur)
        return value

    inner = {"hand_on": hand_on} if op in COMPOSITES else {}
    return _evaluate(op, arguments, differentiable, cotangents, torch.float64, False, inner)


def _precision_inside(arguments):
    wide = any(_is_real(a) and a.dtype == torch.float64 for a in arguments.values())
    return torch.float64 if wide else torch.float32


def _is_real(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _in_precision(value, real):
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_complex():
        return value.to(torch.complex128 if real == torch.float64 else torch.complex64)
    return value.to(real) if value.is_floating_point() else value


def _evaluate(*arguments, **options):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small steps
    try:
        return _evaluate_serially(*arguments, **options)
    finally:
        torch.set_num_threads(threads)


def _evaluate_serially(
    op,
    arguments,
    differentiable,
    cotangents,
    inside,
    rounded,
    inner=None,
):
    arguments = {
        name: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    own = types(arguments)
    if not rounded:
        arguments = {name: _in_precision(value, inside) for name, value in arguments.items()}
    leaves = [name for name in differentiable if arguments.get(name) is not None]
    for name in leaves:
        arguments[name].requires_grad_()

    with torch.enable_grad():
        inner = {name: _in_precision(v, inside) for name, v in arguments.items()} | (inner or {})
        if op == "layer_norm" and rounded:
            inner["stored"] = lambda s: s.to(result_dtype(op, "residual_out", own)).to(inside)
        if op in COMPOSITES:
            if rounded:
                inner["hand_on"] = lambda tensor: tensor.to(own[COMPOSITES[op]]).to(inside)
        results = REFERENCES[op](**inner)
    if rounded:
        results = {name: r.to(result_dtype(op, name, own)) for name, r in results.items()}

    gradients = {}
    if cotangents is not None:
        # A result of padding alone depends on nothing.
        used = [n for n, g in cotangents.items() if g is not None and results[n].requires_grad]
        gradients = [None] * len(leaves)
        if used:
            gradients = torch.autograd.grad(
                [results[name] for name in used],
                [arguments[name] for name in leaves],
                [cotangents[name].detach().cpu().to(results[name].dtype) for name in used],
                allow_unused=True,
            )
        gradients = {
            name: torch.zeros_like(arguments[name]) if g is None else g
            for name, g in zip(leaves, gradients)
        }
    return Outcome({name: r.detach() for name, r in results.items()}, gradients)


def types(arguments):
    """The types of tensors, and the other arguments themselves, by name."""
    return {n: value.dtype if torch.is_tensor(value) else value for n, value in arguments.items()}


def result_dtype(op, result, dtypes):
    """The type that the contract gives a result, from `types` of the arguments."""
    if result == "final_states" and op in ("ssd_chunk_scan", "mamba2_inner"):
        wide = torch.float64 in (dtypes.get("x"), dtypes.get("zxbcdt"))
        return torch.float64 if wide else torch.float32
    if op == "selective_scan" and result == "last_state":
        wide = dtypes["u"] == torch.float64
        if dtypes["A"].is_complex:
            return torch.complex128 if wide else torch.complex64
        return torch.float64 if wide else torch.float32
    if result in ("state", "conv_state", "intermediate_states"):
        return dtypes[result]
    if result == "residual_out":
        if "residual" in dtypes:
            return dtypes["residual"]
        wide = torch.promote_types(dtypes["x"], torch.float32)
        return wide if dtypes["residual_in_fp32"] else dtypes["x"]
    if op == "mamba2_inner":
        return dtypes.get("out_proj_weight", dtypes["zxbcdt"])
    return dtypes["u" if op == "selective_scan" else "xz" if op == "mamba_inner" else "x"]


# Packed sequences -------------------------------------------------------------------------------


def real_runs(ids):
    """[(first, last), ...]: where each sequence of a row starts and ends; ids < 0 are padding."""
    runs = []
    previous = None
    for t, token in enumerate(ids):
        if token < 0:
            continue
        if token == previous:
            runs[-1][1] = t
        else:
            runs.append([t, t])
        previous = token
    return [tuple(run) for run in runs]


# Causal convolution -----------------------------------------------------------------------------


def _activation(a, silu):
    return a * torch.sigmoid(a) if silu else a


def _convolve(history, weight, bias, silu):
    """history (dim, width-1 + seqlen) -> (dim, seqlen): a plain sum over the taps."""
    width = weight.shape[1]
    seqlen = history.shape[-1] - (width - 1)
    a = torch.zeros_like(history[..., :seqlen])
    if bias is not None:
        a = a + bias[:, None]
    for k in range(width):
        a = a + weight[:, k, None] * history[..., k : k + seqlen]
    return _activation(a, silu)


def causal_conv1d(x, weight, bias=None, seq_idx=None, initial_states=None, silu=False):
    batch, dim, seqlen = x.shape
    past = weight.shape[1] - 1
    before = initial_states if initial_states is not None else x.new_zeros(batch, dim, past)
    if seq_idx is None:
        history = torch.cat([before, x], dim=-1)
        final_states = history[..., history.shape[-1] - past :]
        return {"out": _convolve(history, weight, bias, silu), "final_states": final_states}

    out, final_states = [], []
    for b in range(batch):
        ids = seq_idx[b].tolist()
        tokens = torch.where(seq_idx[b] < 0, 0, x[b])
        columns = [x.new_zeros(dim) for _ in range(seqlen)]
        state = before[b]
        for number, (first, last) in enumerate(real_runs(ids)):
            if number == 0:  # the columns of padding stand between the initial state and the row
                history = torch.cat([before[b], tokens[:, : last + 1]], dim=-1)
                begin = 0
            else:
                zeros = x.new_zeros(dim, past)
                history = torch.cat([zeros, tokens[:, first : last + 1]], dim=-1)
                begin = first
            y = _convolve(history, weight, bias, silu)
            for t in range(first, last + 1):
                if ids[t] >= 0:
                    columns[t] = y[:, t - begin]
            state = history[:, history.shape[-1] - past :]
        out.append(torch.stack(columns, dim=-1) if seqlen else x[b])
        final_states.append(state)
    if batch == 0:
        return {"out": x + 0, "final_states": before + 0}
    return {"out": torch.stack(out), "final_states": torch.stack(final_states)}


def causal_conv1d_update(
    x, conv_state, weight, bias=None, cache_seqlens=None, conv_state_indices=None, silu=False
):
    tokens = x if x.dim() == 3 else x[..., None]
    batch, dim, seqlen = tokens.shape
    num_slots, _, state_len = conv_state.shape
    past = weight.shape[1] - 1
    out = torch.zeros_like(tokens)
    state = conv_state.clone()
    for b in range(batch):
        slot = b if conv_state_indices is None else int(conv_state_indices[b])
        if not 0 <= slot < num_slots:
            continue
        ring = 0 if cache_seqlens is None else int(cache_seqlens[b]) % state_len
        order = [(ring + i) % state_len for i in range(state_len)]  # oldest column first
        history = torch.cat([conv_state[slot][:, order], tokens[b]], dim=-1)
        out[b] = _convolve(history[:, state_len - past :], weight, bias, silu)
        if cache_seqlens is None:
            state[slot] = history[:, seqlen:]
        else:
            for t in range(seqlen):
                state[slot][:, (ring + t) % state_len] = tokens[b, :, t]
    return {"out": out.reshape(x.shape), "conv_state": state}


def causal_conv1d_varlen_states(x, cu_seqlens, state_len):
    bounds = cu_seqlens.tolist()
    states = x.new_zeros(len(bounds) - 1, x.shape[1], state_len)
    for i, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        kept = min(state_len, end - begin)
        for j in range(1, kept + 1):
            states[i, :, state_len - j] = x[end - j]
    return {"out": states}


# Selective scan ---------------------------------------------------------------------------------


def softplus(x):
    return torch.where(x <= 20, torch.log1p(torch.exp(torch.where(x <= 20, x, 20))), x)


def _per_channel(M, dim, batch, seqlen, pairs):
    """B or C as (batch, dim, dstate, seqlen), whatever form it came in."""
    if M.dim() == 2:
        return M[None, :, :, None].expand(batch, dim, M.shape[1], seqlen)
    if M.dim() == 3:
        M = M[:, None]
    if pairs:
        M = M.reshape(*M.shape[:-1], seqlen, 2)
        M = torch.complex(M[..., 0], M[..., 1])
    groups = M.shape[1]
    return M[:, [c // (dim // groups) for c in range(dim)]]


def _recurrence(h, u, d, A, B, C):
    """h (batch, dim, dstate), u and d (batch, dim, seqlen) -> y (batch, dim, seqlen), last h."""
    decay = torch.exp(d[:, :, None] * A[:, :, None])
    drive = d[:, :, None] * B * u[:, :, None]
    y = []
    for a_t, b_t, C_t in zip(decay.unbind(-1), drive.unbind(-1), C.unbind(-1)):
        h = a_t * h + b_t
        y_t = (C_t * h).sum(-1)
        y.append(2 * y_t.real if A.is_complex() else y_t)
    return (torch.stack(y, dim=-1) if y else torch.zeros_like(u)), h


def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    initial_state=None,
    seq_idx=None,
    delta_softplus=False,
):
    batch, dim, seqlen = u.shape
    d = delta if delta_bias is None else delta + delta_bias[:, None]
    if delta_softplus:
        d = softplus(d)
    B = _per_channel(B, dim, batch, seqlen, A.is_complex())
    C = _per_channel(C, dim, batch, seqlen, A.is_complex())
    h = initial_state
    if h is None:
        h = torch.zeros(batch, dim, A.shape[1], dtype=A.dtype)

    if seq_idx is None:
        y, last_state = _recurrence(h, u, d, A, B, C)
        real = None
    else:
        rows, states = [], []
        for b in range(batch):
            ids = seq_idx[b].tolist()
            columns = [u.new_zeros(dim) for _ in range(seqlen)]
            state = h[b : b + 1]
            for number, (first, last) in enumerate(real_runs(ids)):
                where = [t for t in range(first, last + 1) if ids[t] >= 0]
                start = state if number == 0 else torch.zeros_like(state)
                pick = (slice(b, b + 1), Ellipsis, where)
                y_run, state = _recurrence(start, u[pick], d[pick], A, B[pick], C[pick])
                for i, t in enumerate(where):
                    columns[t] = y_run[0, :, i]
            rows.append(torch.stack(columns, dim=-1) if seqlen else u[b])
            states.append(state)
        y = torch.stack(rows) if rows else u + 0
        last_state = torch.cat(states) if states else h + 0
        real = (seq_idx >= 0)[:, None]

    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * (z * torch.sigmoid(z))
    if real is not None:
        y = torch.where(real, y, 0)
    return {"out": y, "last_state": last_state}


def _heads(h, x, d, A, B, C, products=None):
    """h (nheads, headdim, dstate) and one list of tokens -> [y (nheads, headdim)], last h."""
    y = []
    for t, (x_t, d_t, B_t, C_t) in enumerate(zip(x, d, B, C)):
        decay = torch.exp(d_t * A)[:, None, None]
        added = d_t[:, None] * x_t
        if products is None:
            h = decay * h + added[:, :, None] * B_t[:, None, :]
            y.append((h * C_t[:, None, :]).sum(-1))
            continue
        if t % products.chunk == 0:  # what tokens see of the state before a chunk
            h = products.gradient_operand(h)
            seen = products.operand(h)
        added = products.operand(added)[:, :, None] * B_t[:, None, :]
        h = decay * h + added
        seen = decay * seen + added
        y.append((seen * C_t[:, None, :]).sum(-1))
    return y, h if products is None else products.gradient_operand(h)


def ssd_chunk_scan(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_min=0.0,
    dt_max=None,
    products=None,
):
    """`products` says what happens to factors of matrix products that are no arguments."""
    batch, seqlen, nheads, headdim = x.shape
    d = dt if dt_bias is None else dt + dt_bias
    if dt_softplus:
        d = softplus(d)
    # A step at a limit has its own derivative; that of torch's clamp is another since torch 2.14.
    within = (d >= dt_min) & (d <= (math.inf if dt_max is None else dt_max))
    d = torch.where(within, d, d.detach().clamp(dt_min, dt_max))
    head_group = [h // (nheads // B.shape[2]) for h in range(nheads)]
    B, C = B[:, :, head_group], C[:, :, head_group]

    if cu_seqlens is None:
        sequences = [(b, 0, seqlen) for b in range(batch)]
    else:
        bounds = cu_seqlens.tolist()
        sequences = [(0, begin, end) for begin, end in zip(bounds, bounds[1:])]
    y = [[x.new_zeros(nheads, headdim)] * seqlen for _ in range(batch)]
    final_states = [x.new_zeros(0, nheads, headdim, B.shape[-1])]
    for number, (b, begin, end) in enumerate(sequences):
        h = x.new_zeros(nheads, headdim, B.shape[-1])
        if initial_states is not None and number < len(initial_states):
            h = initial_states[number]
        ids = [0] * seqlen if seq_idx is None else seq_idx[b].tolist()
        for i, (first, last) in enumerate(real_runs(ids[begin:end])):
            if i > 0:
                h = torch.zeros_like(h)
            where = [t for t in range(begin + first, begin + last + 1) if ids[t] >= 0]
            ys, h = _heads(h, x[b, where], d[b, where], A, B[b, where], C[b, where], products)
            for t, y_t in zip(where, ys):
                y[b][t] = y_t
        final_states.append(h[None])
    rows = [torch.stack(row) for row in y if row]
    y = torch.stack(rows) if rows else x + 0

    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    if z is not None:
        if products is not None:
            y = products.operand(y)
        y = y * (z * torch.sigmoid(z))
    if seq_idx is not None:
        y = torch.where((seq_idx >= 0)[..., None, None], y, 0)
    return {"out": y, "final_states": torch.cat(final_states)}


def selective_state_update(
    state,
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    state_batch_indices=None,
    dt_softplus=False,
    intermediate_states=None,
    A_is_log=False,
):
    if A_is_log:
        A = -torch.exp(A)
    heads = state.dim() == 4
    with_tokens = x.dim() == state.dim()
    new_state = state.clone()
    out = torch.zeros_like(x)
    kept = None if intermediate_states is None else intermediate_states.clone()
    for b in range(x.shape[0]):
        slot = b if state_batch_indices is None else int(state_batch_indices[b])
        if not 0 <= slot < state.shape[0]:
            continue
        for token in [(b, t) for t in range(x.shape[1])] if with_tokens else [(b,)]:
            d = dt[token] if dt_bias is None else dt[token] + dt_bias
            if dt_softplus:
                d = softplus(d)
            B_row, C_row = B[token], C[token]
            if heads:
                per_group = state.shape[1] // B_row.shape[0]
                head_group = [h // per_group for h in range(state.shape[1])]
                B_row, C_row = B_row[head_group][:, None], C_row[head_group][:, None]
            s = new_state[slot] * torch.exp(d[..., None] * A)
            s = s + d[..., None] * B_row * x[token][..., None]
            y = (s * C_row).sum(-1)
            if D is not None:
                y = y + D * x[token]
            if z is not None:
                y = y * (z[token] * torch.sigmoid(z[token]))
            new_state[slot] = s
            out[token] = y
            if kept is not None:
                kept[token] = s
    results = {"out": out, "state": new_state}
    return results if kept is None else {**results, "intermediate_states": kept}


# Norms ------------------------------------------------------------------------------------------


def _normalized(s, eps, is_rms_norm):
    """Over the last axis."""
    if not is_rms_norm:
        s = s - s.mean(dim=-1, keepdim=True)
    return s / torch.sqrt((s * s).mean(dim=-1, keepdim=True) + eps)


def rms_norm_gated(
    x,
    weight,
    bias=None,
    z=None,
    eps=1e-6,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=True,
):
    channels = x.shape[-1]
    gate = None if z is None else z * torch.sigmoid(z)
    s = x * gate if z is not None and not norm_before_gate else x
    width = channels if group_size is None else group_size
    groups = [s[..., c : c + width] for c in range(0, channels, max(width, 1))]
    out = torch.cat([_normalized(g, eps, is_rms_norm) for g in groups], -1) if groups else s + 0
    out = out * weight
    if bias is not None:
        out = out + bias
    return {"out": out * gate if z is not None and norm_before_gate else out}


def layer_norm(
    x,
    weight,
    bias=None,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    rowscale=None,
    dropout_mask=None,
    dropout_mask1=None,
    eps=1e-6,
    dropout_p=0.0,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
    stored=lambda s: s,
):
    """`stored` rounds the sum as it is kept for the backward, which the forward does not see."""
    kept = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    s = x if rowscale is None else x * rowscale[..., None]
    if dropout_mask is not None:
        s = torch.where(dropout_mask, s * kept, 0)
    if x1 is not None:
        s = s + (x1 if dropout_mask1 is None else torch.where(dropout_mask1, x1 * kept, 0))
    if residual is not None:
        s = s + residual
    values = _normalized(s, eps, is_rms_norm)
    derived = _normalized(s + (stored(s) - s).detach(), eps, is_rms_norm)

    def head(w, b):
        out = derived * w if b is None else derived * w + b
        return out + ((values - derived) * w).detach()

    results = {"out": head(weight, bias)}
    if weight1 is not None:
        results["out1"] = head(weight1, bias1)
    if prenorm:
        results["residual_out"] = s
    return results


# Composites -------------------------------------------------------------------------------------


def _rms_norm(x, weight, eps):
    """Over dim 1 of (batch, rows, seqlen)."""
    return x * torch.rsqrt((x * x).mean(dim=1, keepdim=True) + eps) * weight[:, None]


def mamba_inner(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    delta_softplus=True,
    checkpoint_lvl=1,
    b_c_dt_rms_eps=1e-6,
    hand_on=lambda tensor: tensor,
):
    """`hand_on` is what happens to the result of a part on its way to the next."""
    batch, twice_dim, seqlen = xz.shape
    dim = twice_dim // 2
    dt_rank = delta_proj_weight.shape[1]
    pair = 2 if A.is_complex() else 1
    rows = A.shape[1] * pair

    x = causal_conv1d(xz[:, :dim], conv1d_weight[:, 0], conv1d_bias, silu=True)["out"]
    x = hand_on(x)
    projected = hand_on(torch.einsum("bdl,rd->brl", x, x_proj_weight))
    delta = hand_on(torch.einsum("brl,dr->bdl", projected[:, :dt_rank], delta_proj_weight))
    if dt_rms_weight is not None:
        delta = hand_on(_rms_norm(delta, dt_rms_weight, b_c_dt_rms_eps))

    def from_x(M, bias, weight):
        if bias is not None:
            M = hand_on(M + bias[:, None])
        if weight is not None:
            M = hand_on(_rms_norm(M, weight, b_c_dt_rms_eps))
        if pair == 2:  # rows (state, part) -> last axis (time, part)
            M = M.reshape(batch, A.shape[1], 2, seqlen).transpose(2, 3)
            M = M.reshape(batch, A.shape[1], 2 * seqlen)
        return M

    if B is None:
        B = from_x(projected[:, dt_rank : dt_rank + rows], B_proj_bias, b_rms_weight)
    if C is None:
        C = from_x(projected[:, projected.shape[1] - rows :], C_proj_bias, c_rms_weight)
    y = selective_scan(x, delta, A, B, C, D, xz[:, dim:], delta_bias, delta_softplus=delta_softplus)
    y = hand_on(y["out"])
    return {"out": F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)}


def mamba2_inner(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    A,
    headdim,
    ngroups=1,
    D=None,
    dt_bias=None,
    norm_weight=None,
    out_proj_weight=None,
    out_proj_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    silu=True,
    norm_eps=1e-6,
    norm_before_gate=True,
    dt_min=0.0,
    dt_max=None,
    hand_on=lambda tensor: tensor,
    products=None,
):
    """`hand_on` is what happens to the result of a part on its way to the next."""
    batch, seqlen, columns = zxbcdt.shape
    nheads, channels = len(A), len(conv1d_weight)
    dim = nheads * headdim
    d_nonssm = (columns - dim - channels - nheads) // 2
    z0, x0, z, xBC, dt = zxbcdt.split([d_nonssm, d_nonssm, dim, channels, nheads], dim=2)

    bounds = [0, seqlen] if cu_seqlens is None else cu_seqlens.tolist()
    pieces = [xBC[:, :0]]
    for begin, end in zip(bounds, bounds[1:]):
        ids = None if seq_idx is None else seq_idx[:, begin:end]
        piece = xBC[:, begin:end].transpose(1, 2)
        piece = causal_conv1d(piece, conv1d_weight, conv1d_bias, ids, silu=silu)["out"]
        pieces.append(piece.transpose(1, 2))
    xBC = hand_on(torch.cat(pieces, dim=1))
    x, B, C = xBC.split([dim, (channels - dim) // 2, (channels - dim) // 2], dim=2)

    def heads(M, count):
        return M.reshape(batch, seqlen, count, M.shape[2] // count)

    results = ssd_chunk_scan(
        heads(x, nheads),
        dt,
        A,
        heads(B, ngroups),
        heads(C, ngroups),
        D,
        None if norm_weight is not None else heads(z, nheads),
        dt_bias,
        initial_states,
        seq_idx,
        cu_seqlens,
        dt_softplus=True,
        dt_min=dt_min,
        dt_max=dt_max,
        products=products,
    )
    y = hand_on(results["out"].reshape(batch, seqlen, dim))
    if norm_weight is not None:
        options = {"group_size": dim // ngroups, "norm_before_gate": norm_before_gate}
        y = hand_on(rms_norm_gated(y, norm_weight, None, z, norm_eps, **options)["out"])
    if d_nonssm > 0:
        y = torch.cat([hand_on(hand_on(z0 * torch.sigmoid(z0)) * x0), y], dim=2)
    if out_proj_weight is not None:
        y = F.linear(y, out_proj_weight, out_proj_bias)
    return {"out": y, "final_states": results["final_states"]}


def decode_linear(x, weight, bias=None, z=None, norm_weight=None, eps=1e-6):
    n = x if z is None else x * (z * torch.sigmoid(z))
    if norm_weight is not None:
        n = _normalized(n, eps, is_rms_norm=True) * norm_weight
    return {"out": F.linear(n, weight, bias)}


def decode_linear_prenorm(
    x, weight, bias=None, residual=None, norm_weight=None, eps=1e-6, residual_in_fp32=False
):
    total = x if residual is None else x + residual
    out = decode_linear(total, weight, bias, norm_weight=norm_weight, eps=eps)["out"]
    return {"out": out, "residual_out": total}


# And what says their type: operations whose parts hand on results, and those made of products.
COMPOSITES = {"mamba_inner": "xz", "mamba2_inner": "zxbcdt"}
PRODUCTS = {"ssd_chunk_scan": "x", "mamba2_inner": "zxbcdt"}
REFERENCES = {
    "causal_conv1d": causal_conv1d,
    "causal_conv1d_update": causal_conv1d_update,
    "causal_conv1d_varlen_states": causal_conv1d_varlen_states,
    "decode_linear": decode_linear,
    "decode_linear_prenorm": decode_linear_prenorm,
    "selective_scan": selective_scan,
    "selective_state_update": selective_state_update,
    "ssd_chunk_scan": ssd_chunk_scan,
    "rms_norm_gated": rms_norm_gated,
    "layer_norm": layer_norm,
    "mamba_inner": mamba_inner,
    "mamba2_inner": mamba2_inner,
}
