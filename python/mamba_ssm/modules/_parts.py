"""What the modules share: which submodules may be bypassed, inference caches, a step's convolution."""

import math

import torch
import torch.nn as nn


def is_unhooked(module):
    """Whether calling module is calling the forward of its class, and nothing else."""
    return (
        not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
    )


def is_plain(module, kind):
    """Whether module is exactly a `kind`, so that using its weight equals calling its forward."""
    return (
        type(module) is kind  # a parametrized module has a type of its own
        and type(module.weight) in (nn.Parameter, torch.Tensor)
        and is_unhooked(module)
    )


def upcast(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def step_linear(layer, x):
    """layer(x) for few tokens, as in a decode step or a short prompt, x (..., in_features)."""
    if is_plain(layer, nn.Linear):
        return torch.ops.mamba_ssm.step_linear(x, layer.weight, layer.bias)
    return layer(x)


def look_up(embedding, ids):
    """embedding(ids).

    For so few ids torch has a kernel in a module whose loading takes the first decode step of a
    process 50 ms; that of gather takes 11 to 26 (torch 2.11, H200, 2026-11-26).
    """
    most_ids = 16
    if (
        not ids.is_cuda
        or not 0 < ids.numel() <= most_ids
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not is_plain(embedding, nn.Embedding)
        or embedding.max_norm is not None
    ):
        return embedding(ids)
    rows = ids.reshape(-1, 1).long().expand(-1, embedding.embedding_dim)
    return embedding.weight.gather(0, rows).view(*ids.shape, embedding.embedding_dim)


def draw_dt_bias(size, dt_min, dt_max, dt_init_floor, device=None, dtype=None):
    """(size,), whose softplus is log-uniform in [dt_min, dt_max], but at least dt_init_floor.

    Source: arXiv 2312.00752, 3.6.
    """
    dt = torch.rand(size, device=device, dtype=dtype)
    if dt.is_meta:  # without values; for arithmetic on it torch imports its compiler, 1 to 5 s
        return dt
    dt = torch.exp(dt * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min))
    dt = dt.clamp(min=dt_init_floor)
    return dt + torch.log(-torch.expm1(-dt))


# Mixer types that Block may hand what in_proj makes of a decode step's token: called as
# mixer._step(projected (batch, features), *states of the layer).
TAKES_PROJECTED = set()


def read_cache(cache, dtype):
    """Contents of a cache as an argument that autograd may keep while the cache changes."""
    values = cache.detach().to(dtype)
    return values.clone() if torch.is_grad_enabled() and dtype == cache.dtype else values


def cache_options(module, layers, dtype=None):
    """Device and dtype (unless given) of a new cache of module: those of the first of `layers` with
    a weight of floating type, not a quantized one, else those of a parameter, else the defaults."""
    weights = [getattr(layer, "weight", None) for layer in layers]
    for weight in (*weights, *module.parameters()):
        if torch.is_tensor(weight) and weight.is_floating_point():
            return {"device": weight.device, "dtype": dtype or weight.dtype}
    return {"device": torch.get_default_device(), "dtype": dtype or torch.get_default_dtype()}


def states_from_cache(module, inference_params, batch_size, initialize_states=False):
    """The states of layer module.layer_idx, made where there are none; zeros on request."""
    name = type(module).__name__
    if module.layer_idx is None:
        raise ValueError(f"{name}: an inference cache needs a module made with layer_idx=...")
    cache = inference_params.key_value_memory_dict
    states = cache.get(module.layer_idx)
    if states is None or (states[0].shape[0] != batch_size and inference_params.seqlen_offset == 0):
        states = module.allocate_inference_cache(batch_size, inference_params.max_seqlen)
        cache[module.layer_idx] = states
    elif states[0].shape[0] != batch_size:
        raise ValueError(
            f"{name}: layer {module.layer_idx} has cached states of batch size "
            f"{states[0].shape[0]}, but hidden_states have batch size {batch_size}"
        )
    if initialize_states:
        for state in states:
            state.zero_()
    return states


def A_of(A_log):
    """A, from the logarithm of -A that the modules learn."""
    return -torch.exp(upcast(A_log))


def A_of_step(A_log):
    """A of selective_state_update, and whether it is given as log(-A).

    It is on a GPU, where a step is as long as its launches are many, but not on a CPU, where the
    exponentials would be taken for every row.
    """
    return (A_log, True) if A_log.is_cuda else (A_of(A_log), False)


def step_conv1d(conv1d, act, x, conv_state):
    """One token x (batch, dim) through act(conv1d), after the inputs in conv_state.

    conv_state (batch, dim, width) is updated in place; another dtype than x's goes through a copy.
    A replaced or hooked conv1d gets its window through its own forward.
    """
    past = conv_state.detach().to(x.dtype)
    if is_plain(conv1d, nn.Conv1d):
        x = torch.ops.mamba_ssm.causal_conv1d_update(
            x, past, conv1d.weight.squeeze(1), conv1d.bias, silu=True
        )
        if past.dtype != conv_state.dtype:
            conv_state.copy_(past)
        return x
    window = torch.cat([past[..., 1:], x[..., None]], dim=-1)
    conv_state.copy_(window.detach())
    return act(conv1d(window)[..., window.shape[-1] - 1]).to(x.dtype)
