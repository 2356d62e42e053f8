"""Autograd and Meta for ``torch.ops.mamba_ssm`` in Python, where libmamba_ssm.so is not loaded.

The truth is csrc/autograd: results, gradients, layouts and errors are those of the kernels there. A
derivative calls the same op X_bwd, whose results are named after the arguments of X, so that one
pattern serves all ops but layer_norm. Fakes look at what their results are made of; whether the
other arguments fit, the ops themselves check when they run.
"""

import torch

from mamba_ssm.ops import _checks, _composites

_ops = torch.ops.mamba_ssm
_library = torch.library.Library("mamba_ssm", "FRAGMENT")

# X as training runs it, where that is another op: its further results are for X_bwd.
FORWARDS = {"selective_scan": "selective_scan_fwd"}
SELECTIVE_SCAN_CHUNK = 32  # kSelectiveScanChunk of <mamba_ssm/limits.h>


def register():
    """Registers all, each only where nothing is registered yet."""
    for name, (keys, schema, function) in _composites.OPS.items():
        if not hasattr(_ops, name):
            _library.define(name + schema)
        for key in keys:
            _implement(name, function, key)
    for name, fake in FAKES.items():
        if not _has_kernel(name, "Meta"):
            fake = _on_one_device(name, fake)
            torch.library.register_fake(f"mamba_ssm::{name}", fake, lib=_library)
        _implement(name, _autograd_kernel(name), "Autograd")
    if not hasattr(_ops, "layer_norm_traced"):
        schema = str(_ops.layer_norm.default._schema).partition(" -> ")[0].partition("(")[2]
        _library.define(f"layer_norm_traced({schema} -> Tensor[]")
    _implement("layer_norm_traced", _layer_norm_traced, "CompositeImplicitAutograd")
    _implement("layer_norm", _layer_norm_tracer, "Tracer")


def _has_kernel(name, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"mamba_ssm::{name}", key)


def _implement(name, function, key):
    if not _has_kernel(name, key):
        _library.impl(name, function, key)


def _op(name):
    return getattr(_ops, name).default


def _arguments(op, args, kwargs):
    """All arguments by name: the dispatcher leaves out those that have their default."""
    schema = op._schema.arguments
    given = dict(zip((a.name for a in schema), args)) | kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema}


# Autograd ---------------------------------------------------------------------------------------


def _below_autograd(op, *args, **kwargs):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args, **kwargs)


def _autograd_kernel(name):
    """The kernel of `name` for Autograd: recorded as a node where a gradient is wanted."""
    op = _op(name)
    if name == "layer_norm":
        forward, backward, wanted = _layer_norm, _layer_norm_gradients, _gradients("layer_norm_bwd")
    elif hasattr(_ops, f"{name}_bwd"):
        forward, backward, wanted = *_formula(name), _gradients(f"{name}_bwd")
    else:
        return _undifferentiable_kernel(name)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *values):
            results, saved = forward(_arguments(op, values, {}))
            tensors = {n: v for n, v in saved.items() if isinstance(v, torch.Tensor)}
            ctx.save_for_backward(*tensors.values())
            ctx.tensor_names = tuple(tensors)
            ctx.others = {n: None if n in tensors else v for n, v in saved.items()}  # in order
            ctx.set_materialize_grads(False)
            return results

        @staticmethod
        def backward(ctx, *incoming):
            saved = ctx.others | dict(zip(ctx.tensor_names, ctx.saved_tensors))
            gradients = backward(incoming, saved)
            return tuple(gradients.get(a.name) for a in op._schema.arguments)

    def kernel(*args, **kwargs):
        if torch.is_grad_enabled():
            arguments = _arguments(op, args, kwargs)
            if _any_requires_grad(arguments[name] for name in wanted):
                return Node.apply(*arguments.values())
        return _below_autograd(op, *args, **kwargs)

    Node.__name__ = Node.__qualname__ = name
    return kernel


def _undifferentiable_kernel(name):
    """The kernel of an op whose derivative is an error, as autogradNotImplementedFallback is."""
    op = _op(name)
    written = [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *values):
            return _below_autograd(op, **_arguments(op, values, {}))

        @staticmethod
        def backward(ctx, *incoming):
            raise NotImplementedError(f"derivative for mamba_ssm::{name} is not implemented")

    def kernel(*args, **kwargs):
        if torch.is_grad_enabled():
            arguments = _arguments(op, args, kwargs)
            for tensor in map(arguments.get, written):
                if tensor is not None and tensor.requires_grad and tensor.is_leaf:
                    raise RuntimeError(
                        "a leaf Variable that requires grad is being used in an in-place operation."
                    )
            if op._schema.returns and _any_requires_grad(arguments.values()):
                return Node.apply(*arguments.values())
        return _below_autograd(op, *args, **kwargs)

    Node.__name__ = Node.__qualname__ = name
    return kernel


def _any_requires_grad(values):
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in values)


def _gradients(name):
    """The arguments whose gradients the op `name` returns, in order."""
    return [r.name.removeprefix("d") for r in _op(name)._schema.returns]


def _zeros(tensor, dtype=None):
    return torch.zeros((), dtype=dtype or tensor.dtype, device=tensor.device).expand(tensor.shape)


def _formula(name):
    """(forward, backward) of an op whose derivative takes the gradients of the results, further
    results of the forward, and all arguments. The first argument has the shape of the output."""
    run, derivative = _op(FORWARDS.get(name, name)), _op(f"{name}_bwd")
    count = len(_op(name)._schema.returns)

    def forward(arguments):
        results = _below_autograd(run, **arguments)
        if count == 1:
            return results, arguments
        return results[:count], arguments | dict(enumerate(results[count:]))

    def backward(incoming, saved):
        further = [saved.pop(i) for i in range(len(run._schema.returns) - count)]
        dout, *others = incoming
        if dout is None:
            dout = _zeros(next(iter(saved.values())))
        gradients = derivative(dout, *others, *further, **saved)
        return dict(zip(_gradients(f"{name}_bwd"), gradients))

    return forward, backward


def _layer_norm(arguments):
    """Keeps the sum instead of its parts."""
    out, out1, total = _below_autograd(_ops.layer_norm.default, **(arguments | {"prenorm": True}))
    parts = {name: arguments[name] for name in ("x", "residual", "x1")}
    options = ("prenorm", "residual_in_fp32")
    saved = {n: v for n, v in arguments.items() if n not in parts and n not in options}
    saved["sum"] = arguments["x"] if total is None else total
    saved["dtype"] = arguments["x"].dtype
    saved["has_residual"], saved["has_x1"] = (parts[n] is not None for n in ("residual", "x1"))
    return (out, out1, total if arguments["prenorm"] else None), saved


def _layer_norm_gradients(incoming, saved):
    """Those of residual and x1 are None where they equal that of x."""
    dtype = saved.pop("dtype")
    dout, dout1, dresidual_out = incoming
    if dout is None:
        dout = _zeros(saved["sum"], dtype)
    results = _ops.layer_norm_bwd.default(dout, dout1, dresidual_out, **saved)
    gradients = dict(zip(_gradients("layer_norm_bwd"), results))
    for name in ("residual", "x1"):
        if saved[f"has_{name}"] and gradients[name] is None:
            gradients[name] = gradients["x"]
    return gradients


# torch.jit.trace knows no operation with optional results: a list of those that are there.


def _layer_norm_traced(*args, **kwargs):
    return [result for result in _ops.layer_norm.default(*args, **kwargs) if result is not None]


def _layer_norm_tracer(*args, **kwargs):
    arguments = _arguments(_ops.layer_norm.default, args, kwargs)
    out, *others = _ops.layer_norm_traced.default(**arguments)
    out1 = others.pop(0) if arguments["weight1"] is not None else None
    return out, out1, others[0] if others else None


# Meta -------------------------------------------------------------------------------------------


def _on_one_device(name, fake):
    """`fake`, for tensors of one device: a fake among real tensors would make results of nothing."""

    def checked(*args, **kwargs):
        _checks.devices(name, _arguments(_op(name), args, kwargs))
        return fake(*args, **kwargs)

    return checked


def _rows(like, dtype=None):
    """Contiguous, of the shape of `like`."""
    return like.new_empty(like.shape, dtype=dtype)


def _columns(like, batch, dim, columns):
    """(batch, dim, columns) stored as (batch, columns, dim)."""
    return like.new_empty(batch, columns, dim).transpose(1, 2)


def _accumulate_type(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _nothing(*args, **kwargs):
    """Of an op that writes into what the caller made."""


def _fake_gradients(name, **layouts):
    """Every gradient like its argument, or as its layout makes it from that."""

    def fake(*args, **kwargs):
        arguments = _arguments(_op(name), args, kwargs)
        return tuple(
            None if arguments[n] is None else layouts.get(n, torch.empty_like)(arguments[n])
            for n in _gradients(name)
        )

    return fake


def _fake_causal_conv1d(x, weight, *args, **kwargs):
    batch, dim, _ = _checks.sizes("causal_conv1d", "x", x, "batch", "dim", "seqlen")
    _, width = _checks.sizes("causal_conv1d", "weight", weight, "dim", "width")
    return torch.empty_like(x), _columns(x, batch, dim, width - 1)


def _fake_causal_conv1d_update(x, *args, **kwargs):
    return torch.empty_like(x)


def _fake_causal_conv1d_varlen_states(x, cu_seqlens, state_len):
    op = "causal_conv1d_varlen_states"
    _, dim = _checks.sizes(op, "x", x, "total_tokens", "dim")
    (offsets,) = _checks.sizes(op, "cu_seqlens", cu_seqlens, "num_sequences + 1")
    return _columns(x, offsets - 1, dim, state_len)


def _fake_selective_scan_fwd(u, delta, A, *args, **kwargs):
    batch, dim, seqlen = _checks.sizes("selective_scan", "u", u, "batch", "dim", "seqlen")
    _, dstate = _checks.sizes("selective_scan", "A", A, "dim", "dstate")
    dtype = _accumulate_type(u.dtype)
    dtype = dtype.to_complex() if A.is_complex() else dtype
    chunks = (seqlen + SELECTIVE_SCAN_CHUNK - 1) // SELECTIVE_SCAN_CHUNK
    last_state = u.new_empty(batch, dim, dstate, dtype=dtype)
    return torch.empty_like(u), last_state, u.new_empty(batch, chunks, dim, dstate, dtype=dtype)


def _fake_selective_scan(*args, **kwargs):
    return _fake_selective_scan_fwd(*args, **kwargs)[:2]


def _fake_selective_state_update(state, x, *args, **kwargs):
    return torch.empty_like(x)


def _fake_ssd_chunk_scan(*args, **kwargs):
    arguments = _arguments(_ops.ssd_chunk_scan.default, args, kwargs)
    op, x, offsets = "ssd_chunk_scan", arguments["x"], arguments["cu_seqlens"]
    batch, _, nheads, headdim = _checks.sizes(op, "x", x, "batch", "seqlen", "nheads", "headdim")
    *_, dstate = _checks.sizes(op, "B", arguments["B"], "batch", "seqlen", "ngroups", "dstate")
    if offsets is not None:
        batch = _checks.sizes(op, "cu_seqlens", offsets, "num_sequences + 1")[0] - 1
    dtype = _accumulate_type(x.dtype)
    return _rows(x), x.new_empty(batch, nheads, headdim, dstate, dtype=dtype)


def _fake_rms_norm_gated(x, *args, **kwargs):
    return _rows(x)


def _fake_decode_linear(x, weight, *args, **kwargs):
    rows, _ = _checks.sizes("decode_linear", "x", x, "rows", "in_features")
    features, _ = _checks.sizes("decode_linear", "weight", weight, "out_features", "in_features")
    return x.new_empty(rows, features)


def _fake_decode_linear_prenorm(x, weight, *args, **kwargs):
    residual, dtype = kwargs.get("residual"), x.dtype
    if residual is not None:
        dtype = residual.dtype
    elif kwargs.get("residual_in_fp32"):
        dtype = _accumulate_type(dtype)
    return _fake_decode_linear(x, weight), _rows(x, dtype)


def _fake_layer_norm(*args, **kwargs):
    a = _arguments(_ops.layer_norm.default, args, kwargs)
    x, sum_dtype = a["x"], None
    if a["residual"] is not None:
        sum_dtype = a["residual"].dtype
    elif a["residual_in_fp32"] and x.dtype != _accumulate_type(x.dtype):
        sum_dtype = torch.float32
    elif any(a[name] is not None for name in ("x1", "rowscale", "dropout_mask")):
        sum_dtype = x.dtype
    out1 = None if a["weight1"] is None else _rows(x)
    return _rows(x), out1, _rows(x, sum_dtype) if a["prenorm"] and sum_dtype else None


def _fake_layer_norm_bwd(*args, **kwargs):
    a = _arguments(_ops.layer_norm_bwd.default, args, kwargs)
    dout, sum_dtype = a["dout"], a["sum"].dtype
    has_mask, has_mask1 = (a[n] is not None for n in ("dropout_mask", "dropout_mask1"))
    scaled = a["rowscale"] is not None or has_mask
    dresidual = a["has_residual"] and (sum_dtype != dout.dtype or scaled)
    dx1 = a["has_x1"] and (has_mask or has_mask1)
    like = {
        n: a[n] if a[n] is None else torch.empty_like(a[n]) for n in ("bias", "weight1", "bias1")
    }
    return (
        _rows(dout),
        torch.empty_like(a["weight"]),
        like["bias"],
        _rows(dout, sum_dtype) if dresidual else None,
        _rows(dout) if dx1 else None,
        like["weight1"],
        like["bias1"],
    )


def _state_columns(states):
    return _columns(states, *states.shape)


FAKES = {
    "causal_conv1d": _fake_causal_conv1d,
    "causal_conv1d_out": _nothing,
    "causal_conv1d_bwd": _fake_gradients("causal_conv1d_bwd", initial_states=_state_columns),
    "causal_conv1d_bwd_out": _nothing,
    "causal_conv1d_update": _fake_causal_conv1d_update,
    "causal_conv1d_varlen_states": _fake_causal_conv1d_varlen_states,
    "selective_scan": _fake_selective_scan,
    "selective_scan_fwd": _fake_selective_scan_fwd,
    "selective_scan_bwd": _fake_gradients("selective_scan_bwd"),
    "selective_scan_bwd_out": _nothing,
    "selective_state_update": _fake_selective_state_update,
    "ssd_chunk_scan": _fake_ssd_chunk_scan,
    "ssd_chunk_scan_bwd": _fake_gradients("ssd_chunk_scan_bwd"),
    "ssd_chunk_scan_bwd_out": _nothing,
    "rms_norm_gated": _fake_rms_norm_gated,
    "rms_norm_gated_bwd": _fake_gradients("rms_norm_gated_bwd", x=_rows, z=_rows),
    "rms_norm_gated_bwd_out": _nothing,
    "decode_linear": _fake_decode_linear,
    "decode_linear_prenorm": _fake_decode_linear_prenorm,
    "layer_norm": _fake_layer_norm,
    "layer_norm_bwd": _fake_layer_norm_bwd,
}
