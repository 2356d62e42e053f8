"""The entry points of the former C extension of this name, in each of its historic forms.

The number of positional arguments tells the forms apart. All run on CPU and CUDA. Up to 1.5.0
results were returned; since 1.5.1 they are written into arguments.
"""

from causal_conv1d.cpp_functions import (
    causal_conv1d_bwd_function,
    causal_conv1d_fwd_function,
    causal_conv1d_update_function,
)


def _wrong_count(name, expected, args):
    return TypeError(f"{name} takes {expected} positional arguments, got {len(args)}")


def causal_conv1d_fwd(*args):
    """Convolution.

    (x, weight, bias, silu) -> out
    (x, weight, bias, seq_idx, silu) -> out
    (x, weight, bias, seq_idx, initial_states, final_states_out, silu) -> out
    (x, weight, bias, seq_idx, initial_states, out, final_states_out, silu) -> None
    """
    if len(args) in (4, 5):
        *tensors, silu = args
        x, weight, bias, seq_idx = (*tensors, None)[:4]
        return causal_conv1d_fwd_function(x, weight, bias, seq_idx, None, None, silu)
    if len(args) == 7:
        return causal_conv1d_fwd_function(*args)
    if len(args) == 8:
        *inputs, out, final_states_out, silu = args
        out.copy_(causal_conv1d_fwd_function(*inputs, final_states_out, silu))
        return None
    raise _wrong_count("causal_conv1d_fwd", "4, 5, 7 or 8", args)


def causal_conv1d_bwd(*args):
    """Derivative of the convolution; dx may be None or a tensor to fill in the first three forms.

    (x, weight, bias, dout, dx, silu) -> [dx, dweight, dbias]
    (x, weight, bias, dout, seq_idx, dx, silu) -> [dx, dweight, dbias]
    (x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states,
     silu) -> [dx, dweight, dbias, dinitial_states]
    (x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, dweight, dbias,
     dinitial_states, silu) -> None; dweight and dbias are float32 sums to add to
    """
    if len(args) in (6, 7):
        *tensors, dx, silu = args
        x, weight, bias, dout, seq_idx = (*tensors, None)[:5]
        gradients = causal_conv1d_bwd_function(
            x, weight, bias, dout, seq_idx, None, None, dx, False, silu
        )
        return list(gradients[:3])
    if len(args) == 10:
        return list(causal_conv1d_bwd_function(*args))
    if len(args) == 12:
        x, weight, bias, dout, seq_idx, initial, dfinal, dx, dweight, dbias, dinitial, silu = args
        # Parameters in the dtype of the sums, so that their gradients are not rounded before.
        _, dweight_new, dbias_new, dinitial_new = causal_conv1d_bwd_function(
            x,
            weight.to(dweight.dtype),
            None if bias is None else bias.to(dbias.dtype),
            dout,
            seq_idx,
            initial,
            dfinal,
            dx,
            dinitial is not None,
            silu,
        )
        dweight += dweight_new
        if bias is not None:
            dbias += dbias_new
        if dinitial is not None:
            dinitial.copy_(dinitial_new)
        return None
    raise _wrong_count("causal_conv1d_bwd", "6, 7, 10 or 12", args)


def causal_conv1d_update(*args):
    """Decode step; updates conv_state in place.

    (x, conv_state, weight, bias, silu) -> out
    (x, conv_state, weight, bias, silu, cache_seqlens) -> out
    (x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices) -> out
    (x, conv_state, weight, bias, out, silu, cache_seqlens, conv_state_indices) -> None
    """
    if len(args) in (5, 6, 7):
        return causal_conv1d_update_function(*(*args, None, None)[:7])
    if len(args) == 8:
        x, conv_state, weight, bias, out, *rest = args
        out.copy_(causal_conv1d_update_function(x, conv_state, weight, bias, *rest))
        return None
    raise _wrong_count("causal_conv1d_update", "5, 6, 7 or 8", args)
