"""What existing programs rely on: import paths, signatures, former calling orders, side effects."""

import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys

import pytest
import torch

SIGNATURES = {
    "mamba_ssm:selective_scan_fn": "u, delta, A, B, C, D=None, z=None, delta_bias=None, "
    "delta_softplus=False, return_last_state=False, *, initial_state=None, seq_idx=None",
    "mamba_ssm.ops.selective_scan_interface:selective_scan_ref": "u, delta, A, B, C, D=None, "
    "z=None, delta_bias=None, delta_softplus=False, return_last_state=False",
    "mamba_ssm:mamba_inner_fn": "xz, conv1d_weight, conv1d_bias, x_proj_weight, "
    "delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, C=None, D=None, "
    "delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True, checkpoint_lvl=1, "
    "b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-06",
    "mamba_ssm.ops.selective_scan_interface:mamba_inner_ref": "xz, conv1d_weight, conv1d_bias, "
    "x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, C=None, D=None, "
    "delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True",
    "mamba_ssm.ops.selective_scan_interface:rms_norm_forward": "x, weight, bias, eps=1e-06, "
    "is_rms_norm=True",
    "mamba_ssm.ops.triton.selective_state_update:selective_state_update": "state, x, dt, A, B, C, "
    "D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None, *, "
    "intermediate_states=None",
    "mamba_ssm.ops.triton.selective_state_update:selective_state_update_ref": "state, x, dt, A, "
    "B, C, D=None, z=None, dt_bias=None, dt_softplus=False",
    "mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined": "x, dt, A, B, C, chunk_size, "
    "D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None, "
    "dt_softplus=False, dt_limit=(0.0, inf), return_final_states=False, "
    "return_varlen_states=False, state_dtype=None",
    "mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan": "x, dt, A, B, C, chunk_size, D=None, "
    "z=None, dt_bias=None, dt_softplus=False",
    "mamba_ssm.ops.triton.ssd_combined:ssd_chunk_scan_combined_ref": "x, dt, A, B, C, chunk_size, "
    "D=None, z=None, dt_bias=None, dt_softplus=False",
    "mamba_ssm.ops.triton.ssd_combined:ssd_selective_scan": "x, dt, A, B, C, D=None, z=None, "
    "dt_bias=None, dt_softplus=False, dt_limit=(0.0, inf)",
    "mamba_ssm.ops.triton.ssd_combined:mamba_split_conv1d_scan_combined": "zxbcdt, conv1d_weight, "
    "conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None, seq_idx=None, "
    "dt_limit=(0.0, inf), return_final_states=False, activation='silu', rmsnorm_weight=None, "
    "rmsnorm_eps=1e-06, outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, "
    "norm_before_gate=True, state_dtype=None, *, cu_seqlens=None",
    "mamba_ssm.ops.triton.ssd_combined:mamba_split_conv1d_scan_ref": "zxbcdt, conv1d_weight, "
    "conv1d_bias, dt_bias, A, D, chunk_size, dt_limit=(0.0, inf), activation='silu', "
    "rmsnorm_weight=None, rmsnorm_eps=1e-06, outproj_weight=None, outproj_bias=None, "
    "headdim=None, ngroups=1, norm_before_gate=True",
    "mamba_ssm.ops.triton.ssd_combined:mamba_conv1d_scan_ref": "xBC, conv1d_weight, conv1d_bias, "
    "dt, A, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, inf), "
    "activation='silu', headdim=None, ngroups=1",
    "mamba_ssm.ops.triton.ssd_combined:ensure_stride": "inp",
    "mamba_ssm.modules.ssd_minimal:ssd_minimal_discrete": "X, A, B, C, block_len, "
    "initial_states=None",
    "mamba_ssm.ops.triton.layer_norm:layer_norm_fn": "x, weight, bias, residual=None, x1=None, "
    "weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, rowscale=None, prenorm=False, "
    "residual_in_fp32=False, is_rms_norm=False, return_dropout_mask=False",
    "mamba_ssm.ops.triton.layer_norm:rms_norm_fn": "x, weight, bias, residual=None, x1=None, "
    "weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, rowscale=None, prenorm=False, "
    "residual_in_fp32=False, return_dropout_mask=False",
    "mamba_ssm.ops.triton.layer_norm:layer_norm_linear_fn": "x, norm_weight, norm_bias, "
    "linear_weight, linear_bias, residual=None, eps=1e-06, prenorm=False, residual_in_fp32=False, "
    "is_rms_norm=False",
    "mamba_ssm.ops.triton.layer_norm:RMSNorm": "hidden_size, eps=1e-05, dropout_p=0.0, "
    "device=None, dtype=None",
    "mamba_ssm.ops.triton.layer_norm:RMSNorm.forward": "self, x, residual=None, prenorm=False, "
    "residual_in_fp32=False",
    "mamba_ssm.ops.triton.layernorm:layer_norm_fn": "x, weight, bias, residual=None, eps=1e-06, "
    "prenorm=False, residual_in_fp32=False, is_rms_norm=False",
    "mamba_ssm.ops.triton.layernorm:rms_norm_fn": "x, weight, bias, residual=None, prenorm=False, "
    "residual_in_fp32=False, eps=1e-06",
    "mamba_ssm.ops.triton.layernorm_gated:layernorm_fn": "x, weight, bias, z=None, eps=1e-06, "
    "group_size=None, norm_before_gate=True, is_rms_norm=False",
    "mamba_ssm.ops.triton.layernorm_gated:rmsnorm_fn": "x, weight, bias, z=None, eps=1e-06, "
    "group_size=None, norm_before_gate=True",
    "mamba_ssm.ops.triton.layernorm_gated:rms_norm_ref": "x, weight, bias, z=None, eps=1e-06, "
    "group_size=None, norm_before_gate=True, upcast=True",
    "mamba_ssm.ops.triton.layernorm_gated:RMSNorm": "hidden_size, eps=1e-05, group_size=None, "
    "norm_before_gate=True, device=None, dtype=None",
    "mamba_ssm.ops.triton.layernorm_gated:LayerNorm": "hidden_size, eps=1e-05, group_size=None, "
    "norm_before_gate=True, device=None, dtype=None",
    "mamba_ssm:Mamba": "d_model, d_state=16, d_conv=4, expand=2, dt_rank='auto', dt_min=0.001, "
    "dt_max=0.1, dt_init='random', dt_scale=1.0, dt_init_floor=0.0001, conv_bias=True, "
    "bias=False, use_fast_path=True, layer_idx=None, device=None, dtype=None",
    "mamba_ssm.modules.mamba_simple:Mamba.forward": "self, hidden_states, inference_params=None, "
    "*, seq_idx=None",
    "mamba_ssm.modules.mamba_simple:Mamba.step": "self, hidden_states, conv_state, ssm_state",
    "mamba_ssm.modules.mamba_simple:Mamba.allocate_inference_cache": "self, batch_size, "
    "max_seqlen, dtype=None, *, state_dtype=None, **kwargs",
    "mamba_ssm:Mamba2": "d_model, d_state=128, d_conv=4, conv_init=None, expand=2, headdim=64, "
    "d_ssm=None, ngroups=1, A_init_range=(1, 16), D_has_hdim=False, rmsnorm=True, "
    "norm_before_gate=False, dt_min=0.001, dt_max=0.1, dt_init_floor=0.0001, "
    "dt_limit=(0.0, inf), bias=False, conv_bias=True, chunk_size=256, use_mem_eff_path=True, "
    "layer_idx=None, process_group=None, sequence_parallel=True, device=None, dtype=None",
    "mamba_ssm.modules.mamba2:Mamba2.forward": "self, u, seqlen=None, seq_idx=None, "
    "cu_seqlens=None, inference_params=None",
    "mamba_ssm.modules.mamba2:Mamba2.step": "self, hidden_states, conv_state, ssm_state",
    "mamba_ssm.modules.mamba2:Mamba2.allocate_inference_cache": "self, batch_size, max_seqlen, "
    "dtype=None, *, state_dtype=None, **kwargs",
    "mamba_ssm.modules.mamba2_simple:Mamba2Simple": "d_model, d_state=64, d_conv=4, "
    "conv_init=None, expand=2, headdim=128, ngroups=1, A_init_range=(1, 16), dt_min=0.001, "
    "dt_max=0.1, dt_init_floor=0.0001, dt_limit=(0.0, inf), learnable_init_states=False, "
    "activation='swish', bias=False, conv_bias=True, chunk_size=256, use_mem_eff_path=True, "
    "layer_idx=None, device=None, dtype=None",
    "mamba_ssm.modules.mamba2_simple:Mamba2Simple.forward": "self, u, seq_idx=None",
    "mamba_ssm.modules.mha:MHA": "embed_dim, num_heads, num_heads_kv=None, head_dim=None, "
    "mlp_dim=0, qkv_proj_bias=True, out_proj_bias=True, softmax_scale=None, causal=False, "
    "layer_idx=None, d_conv=0, rotary_emb_dim=0, rotary_emb_base=10000.0, "
    "rotary_emb_interleaved=False, device=None, dtype=None",
    "mamba_ssm.modules.mha:MHA.forward": "self, x, inference_params=None, *, seq_idx=None, "
    "cu_seqlens=None",
    "mamba_ssm.modules.mha:MHA.allocate_inference_cache": "self, batch_size, max_seqlen, "
    "dtype=None, **kwargs",
    "mamba_ssm.modules.mha:_update_kv_cache": "kv, inference_params, layer_idx",
    "mamba_ssm.modules.mlp:GatedMLP": "in_features, hidden_features=None, out_features=None, "
    "activation=<function silu>, bias=False, multiple_of=128, device=None, dtype=None",
    "mamba_ssm.modules.block:Block": "dim, mixer_cls, mlp_cls=<class "
    "'torch.nn.modules.linear.Identity'>, norm_cls=<class "
    "'torch.nn.modules.normalization.LayerNorm'>, fused_add_norm=False, residual_in_fp32=False",
    "mamba_ssm.modules.block:Block.forward": "self, hidden_states, residual=None, "
    "inference_params=None, **mixer_kwargs",
    "mamba_ssm.modules.mamba_simple:Block": "dim, mixer_cls, norm_cls=<class "
    "'torch.nn.modules.normalization.LayerNorm'>, fused_add_norm=False, residual_in_fp32=False",
    "mamba_ssm.ops.triton.k_activations:swiglu": "xy",
    "mamba_ssm.ops.triton.k_activations:_swiglu_fwd": "xy, out=None",
    "mamba_ssm.ops.triton.k_activations:_swiglu_bwd": "xy, dout, dxy=None, "
    "recompute_output=False, out=None",
    "mamba_ssm.models.config_mamba:MambaConfig": "d_model: int = 2560, d_intermediate: int = 0, "
    "n_layer: int = 64, vocab_size: int = 50277, ssm_cfg: dict = <factory>, attn_layer_idx: list = "
    "<factory>, attn_cfg: dict = <factory>, rms_norm: bool = True, residual_in_fp32: bool = True, "
    "fused_add_norm: bool = True, pad_vocab_size_multiple: int = 8, tie_embeddings: bool = True",
    "mamba_ssm.models.mixer_seq_simple:_init_weights": "module, n_layer, initializer_range=0.02, "
    "rescale_prenorm_residual=True, n_residuals_per_layer=1",
    "mamba_ssm.models.mixer_seq_simple:MixerModel": "d_model, n_layer, d_intermediate=0, "
    "vocab_size=None, ssm_cfg=None, attn_layer_idx=None, attn_cfg=None, norm_epsilon=1e-05, "
    "rms_norm=False, initializer_cfg=None, fused_add_norm=False, residual_in_fp32=False, "
    "device=None, dtype=None",
    "mamba_ssm.models.mixer_seq_simple:MixerModel.forward": "self, input_ids, "
    "inference_params=None, **mixer_kwargs",
    "mamba_ssm:MambaLMHeadModel": "config: mamba_ssm.models.config_mamba.MambaConfig, "
    "initializer_cfg=None, device=None, dtype=None",
    "mamba_ssm.models.mixer_seq_simple:MambaLMHeadModel.forward": "self, input_ids, "
    "position_ids=None, inference_params=None, num_last_tokens=0, **mixer_kwargs",
    "mamba_ssm:MambaLMHeadModel.from_pretrained": "pretrained_model_name, device=None, dtype=None, "
    "*, use_safetensors=True, **kwargs",
    "mamba_ssm:MambaLMHeadModel.save_pretrained": "self, save_directory",
    "mamba_ssm:MambaLMHeadModel.allocate_inference_cache": "self, batch_size, max_seqlen, "
    "dtype=None, **kwargs",
    "mamba_ssm:MambaLMHeadModel.tie_weights": "self",
    "mamba_ssm.utils.hf:load_config_hf": "model_name",
    "mamba_ssm.utils.hf:load_state_dict_hf": "model_name, device=None, dtype=None, *, "
    "use_safetensors=True",
    "mamba_ssm.utils.determinism:set_deterministic_mode": "value",
    "mamba_ssm.utils.determinism:use_deterministic_mode": "",
    "mamba_ssm.models.mixer_seq_simple:create_block": "d_model, d_intermediate=0, ssm_cfg=None, "
    "attn_layer_idx=None, attn_cfg=None, norm_epsilon=1e-05, rms_norm=False, "
    "residual_in_fp32=False, fused_add_norm=False, layer_idx=None, device=None, dtype=None",
    "mamba_ssm.distributed.distributed_utils:all_gather_raw": "input_, process_group, "
    "async_op=False",
    "mamba_ssm.distributed.distributed_utils:reduce_scatter_raw": "input_, process_group, "
    "async_op=False",
    "mamba_ssm.distributed.distributed_utils:all_reduce_raw": "input_, process_group, "
    "async_op=False",
    "mamba_ssm.distributed.distributed_utils:sync_shared_params": "model, process_group",
    "mamba_ssm.distributed.distributed_utils:allreduce_sequence_parallel_grad": "model, "
    "process_group",
    "mamba_ssm.distributed.distributed_utils:get_dim_for_local_rank": "dim, world_size, "
    "local_rank, multiple_of=1",
    "mamba_ssm.distributed.tensor_parallel:parallel_linear_func": "x, weight, bias=None, "
    "process_group=None, sequence_parallel=True",
    "mamba_ssm.distributed.tensor_parallel:ColumnParallelLinear": "in_features, out_features, "
    "process_group, bias=True, sequence_parallel=True, multiple_of=1, device=None, dtype=None",
    "mamba_ssm.distributed.tensor_parallel:RowParallelLinear": "in_features, out_features, "
    "process_group, bias=True, sequence_parallel=True, multiple_of=1, device=None, dtype=None",
    "mamba_ssm.distributed.tensor_parallel:VocabParallelEmbedding": "num_embeddings, *args, "
    "process_group=None, padding_idx=None, **kwargs",
    "mamba_ssm.distributed.tensor_parallel:ColumnParallelEmbedding": "num_embeddings, "
    "embedding_dim, *args, process_group=None, **kwargs",
    "mamba_ssm.distributed.tensor_parallel:ParallelEmbeddings": "embed_dim, vocab_size, "
    "max_position_embeddings, process_group, padding_idx=None, sequence_parallel=True, "
    "device=None, dtype=None",
    "mamba_ssm.distributed.tensor_parallel:ParallelEmbeddings.forward": "self, input_ids, "
    "position_ids=None, combine_batch_seqlen_dim=False",
    "mamba_ssm.utils.generation:InferenceParams.reset": "self, max_seqlen, max_batch_size",
    "mamba_ssm.utils.generation:modify_logits_for_min_p_filtering": "logits, min_p",
    "mamba_ssm.utils.generation:modify_logits_for_top_k_filtering": "logits, top_k",
    "mamba_ssm.utils.generation:modify_logits_for_top_p_filtering": "logits, top_p",
    "mamba_ssm.utils.generation:modify_logit_for_repetition_penalty": "logits, "
    "prev_output_tokens, repetition_penalty=1.0",
    "mamba_ssm.utils.generation:sample": "logits, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0, "
    "*, generator=None",
    "mamba_ssm.utils.generation:decode": "input_ids, model, max_length, top_k=1, top_p=0.0, "
    "min_p=0.0, temperature=1.0, repetition_penalty=1.0, eos_token_id=None, teacher_outputs=None, "
    "vocab_size=None, cg=False, enable_timing=False, output_scores=False, streamer=None, *, "
    "lengths=None, pad_token_id=None, generator=None, prefill_chunk_size=None, state_dtype=None, "
    "should_stop=None",
    "mamba_ssm:MambaLMHeadModel.generate": "self, input_ids, max_length, top_k=1, top_p=0.0, "
    "min_p=0.0, temperature=1.0, return_dict_in_generate=False, output_scores=False, **kwargs",
    "mamba_ssm.utils.generation:update_graph_cache": "model, cache, batch_size, seqlen_og, "
    "max_seqlen, decoding_seqlens=(1,), dtype=None, n_warmups=2, *, state_dtype=None",
    "mamba_ssm.utils.generation:capture_graph": "model, inference_params, batch_size, max_seqlen, "
    "decoding_seqlen=1, mempool=None, n_warmups=2",
    "causal_conv1d:causal_conv1d_fn": "x, weight, bias=None, seq_idx=None, initial_states=None, "
    "return_final_states=False, final_states_out=None, activation=None",
    "causal_conv1d:causal_conv1d_update": "x, conv_state, weight, bias=None, activation=None, "
    "cache_seqlens=None, conv_state_indices=None",
    "causal_conv1d.causal_conv1d_interface:causal_conv1d_ref": "x, weight, bias=None, "
    "initial_states=None, return_final_states=False, final_states_out=None, activation=None, "
    "seq_idx=None",
    "causal_conv1d.causal_conv1d_interface:causal_conv1d_update_ref": "x, conv_state, weight, "
    "bias=None, activation=None, cache_seqlens=None",
    "causal_conv1d.causal_conv1d_varlen:causal_conv1d_varlen_states": "x, cu_seqlens, state_len",
    "causal_conv1d.cpp_functions:causal_conv1d_fwd_function": "x, weight, bias, seq_idx, "
    "initial_states, final_states_out, silu_activation",
    "causal_conv1d.cpp_functions:causal_conv1d_bwd_function": "x, weight, bias, dout, seq_idx, "
    "initial_states, dfinal_states, dx, return_dinitial_states, silu_activation",
    "causal_conv1d.cpp_functions:causal_conv1d_update_function": "x, conv_state, weight, bias, "
    "silu_activation, cache_seqlens, conv_state_indices",
    "selective_scan_cuda:fwd": "u, delta, A, B, C, D, z, delta_bias, delta_softplus",
    "selective_scan_cuda:bwd": "u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, "
    "delta_softplus, recompute_out_z",
}

NAMES = {
    "mamba_ssm": "__version__ MambaLMHeadModel selective_scan_fn mamba_inner_fn",
    "mamba_ssm.ops.selective_scan_interface": "SelectiveScanFn MambaInnerFn selective_scan_cuda",
    "mamba_ssm.ops.triton.ssd_combined": "MambaChunkScanCombinedFn "
    "MambaSplitConv1dScanCombinedFn _mamba_chunk_scan_combined_fwd _mamba_chunk_scan_combined_bwd",
    "mamba_ssm.ops.triton.ssd_chunk_state": "_chunk_cumsum_fwd _chunk_state_fwd chunk_state "
    "chunk_state_ref chunk_state_varlen",
    "mamba_ssm.ops.triton.ssd_state_passing": "_state_passing_fwd state_passing state_passing_ref",
    "mamba_ssm.ops.triton.ssd_bmm": "_bmm_chunk_fwd",
    "mamba_ssm.ops.triton.ssd_chunk_scan": "_chunk_scan_fwd chunk_scan chunk_scan_ref",
    "mamba_ssm.modules.ssd_minimal": "segsum",
    "mamba_ssm.ops.triton.layer_norm": "LayerNormFn LayerNormLinearFn layer_norm_ref rms_norm_ref "
    "_layer_norm_fwd",
    "mamba_ssm.ops.triton.layernorm": "RMSNorm LayerNormFn layer_norm_ref rms_norm_ref "
    "layer_norm_linear_fn _layer_norm_fwd",
    "mamba_ssm.ops.triton.layernorm_gated": "LayerNormFn _layer_norm_fwd _layer_norm_bwd",
    "mamba_ssm.distributed.distributed_utils": "AllGatherFunc ReduceScatterFunc AllReduceFunc "
    "all_gather reduce_scatter all_reduce",
    "mamba_ssm.distributed.tensor_parallel": "ParallelLinearFunc",
    "mamba_ssm.modules.mamba_simple": "Mamba Block",
    "mamba_ssm.ops.triton.k_activations": "SwiGLU swiglu",
    "mamba_ssm.utils.torch": "custom_amp_decorator custom_fwd custom_bwd",
    "mamba_ssm.models.config_mamba": "MambaConfig",
    "mamba_ssm.models.mixer_seq_simple": "MixerModel _init_weights",
    "mamba_ssm.utils.generation": "InferenceParams DecodingCGCache GenerationMixin",
    "causal_conv1d": "__version__",
    "causal_conv1d.causal_conv1d_interface": "CausalConv1dFn causal_conv1d_fwd_function "
    "causal_conv1d_bwd_function causal_conv1d_update_function",
    "causal_conv1d.causal_conv1d_varlen": "causal_conv1d_varlen_states_ref",
    "causal_conv1d.cpp_functions": "LIBRARY_NAME",
    "causal_conv1d_cuda": "causal_conv1d_fwd causal_conv1d_bwd causal_conv1d_update",
}


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path):
    module, _, name = path.partition(":")
    function = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    assert inspect.isroutine(function) or inspect.isclass(function)
    signature = re.sub(" at 0x[0-9a-f]+", "", str(inspect.signature(function)))
    assert signature.removesuffix(" -> None") == f"({SIGNATURES[path]})"


@pytest.mark.parametrize("module", NAMES)
def test_names(module):
    for name in NAMES[module].split():
        assert hasattr(importlib.import_module(module), name), name


@pytest.mark.parametrize("name, least", [("mamba_ssm", (2, 4, 0)), ("causal_conv1d", (1, 7, 0))])
def test_distribution(name, least):
    version = importlib.metadata.version(name)
    assert version == importlib.import_module(name).__version__
    assert tuple(map(int, version.split("."))) >= least


def test_determinism_mode(monkeypatch):
    from mamba_ssm.utils.determinism import set_deterministic_mode, use_deterministic_mode

    monkeypatch.delenv("MAMBA_DETERMINISTIC", raising=False)
    assert use_deterministic_mode() == torch.are_deterministic_algorithms_enabled()
    for value in ("1", "0"):
        monkeypatch.setenv("MAMBA_DETERMINISTIC", value)
        assert use_deterministic_mode() == (value == "1")
        for mode in (True, False):
            set_deterministic_mode(mode)
            assert use_deterministic_mode() is mode
        set_deterministic_mode(None)


def test_amp_decorators():
    from mamba_ssm.utils.torch import custom_bwd, custom_fwd

    class Double(torch.autograd.Function):
        @staticmethod
        @custom_fwd(cast_inputs=torch.float32)
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @custom_bwd
        def backward(ctx, dout):
            return 2 * dout

    x = torch.ones(3, requires_grad=True)
    Double.apply(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


def in_new_process(program):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )


def test_import_has_no_side_effects():
    program = """
import sys, torch
before, threads = set(sys.modules), torch.get_num_threads()
import mamba_ssm
new = {name.partition(".")[0] for name in set(sys.modules) - before}
new -= set(sys.stdlib_module_names) | {"torch"}
assert new == {"mamba_ssm", "selective_scan_cuda"}, new
assert "mamba_ssm._C" not in sys.modules
assert not torch.cuda.is_initialized()
assert torch.get_num_threads() == threads
"""
    result = in_new_process(program)
    assert result.stdout == "" and result.stderr == ""


def test_submodules_are_attributes():
    in_new_process(
        """
import mamba_ssm
assert callable(mamba_ssm.ops.triton.selective_state_update.selective_state_update)
assert callable(mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined)
assert callable(mamba_ssm.ops.triton.layer_norm.layer_norm_fn)
assert callable(mamba_ssm.ops.triton.layernorm.layer_norm_fn)
assert callable(mamba_ssm.ops.triton.layernorm_gated.rmsnorm_fn)
assert callable(mamba_ssm.ops.selective_scan_interface.selective_scan_fn)
assert mamba_ssm.modules.mamba_simple.Mamba is mamba_ssm.Mamba
assert mamba_ssm.models.mixer_seq_simple and mamba_ssm.utils.generation
assert not hasattr(mamba_ssm, "selective_state_update")
"""
    )


@pytest.mark.parametrize("first", ["selective_scan_cuda", "causal_conv1d_cuda", "causal_conv1d"])
def test_any_module_may_be_imported_first(first):
    in_new_process(f"import {first}, mamba_ssm")


@pytest.mark.parametrize("module", ["mamba_ssm.ops.selective_scan_interface", "causal_conv1d"])
def test_modules_reload(module):
    in_new_process(f"import importlib, {module} as m; importlib.reload(m)")


def test_another_torch_is_refused():
    result = subprocess.run(
        [sys.executable, "-c", "import torch; torch.__version__ = '2.9.1'; import mamba_ssm"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "ImportError" in result.stderr and "torch 2.9.1 is running" in result.stderr


@pytest.fixture
def conv(device):
    torch.manual_seed(0)
    shapes = {"x": (2, 6, 9), "weight": (6, 4), "bias": (6,), "dout": (2, 6, 9), "state": (2, 6, 3)}
    return {name: torch.randn(shape).to(device) for name, shape in shapes.items()}


def test_conv_in_former_orders(conv):
    from causal_conv1d import causal_conv1d_fn
    from causal_conv1d.causal_conv1d_interface import CausalConv1dFn, causal_conv1d_ref

    x, weight, bias, state = conv["x"], conv["weight"], conv["bias"], conv["state"]
    expected = causal_conv1d_ref(x, weight, bias, activation="silu")
    for activation in ("silu", "swish", True):
        torch.testing.assert_close(causal_conv1d_fn(x, weight, bias, activation), expected)
    applied = CausalConv1dFn.apply(x, weight, bias, None, state, True, None, "silu")
    expected = causal_conv1d_ref(x, weight, bias, state, True, activation="silu")
    torch.testing.assert_close(applied, expected)
    with pytest.raises(NotImplementedError, match="relu"):
        causal_conv1d_fn(x, weight, bias, activation="relu")


@pytest.mark.parametrize("channel_last", [False, True])
def test_final_states_are_written_in_place(conv, channel_last):
    from causal_conv1d import causal_conv1d_fn

    x, weight, state = conv["x"], conv["weight"], conv["state"]
    buffer = torch.empty_like(state)
    if channel_last:
        buffer = buffer.transpose(1, 2).contiguous().transpose(1, 2)
    out, final = causal_conv1d_fn(
        x, weight, initial_states=state, return_final_states=True, final_states_out=buffer
    )
    assert final is buffer
    torch.testing.assert_close(buffer, x[..., -3:])
    buffer.zero_()
    torch.testing.assert_close(causal_conv1d_fn(x, weight, None, None, state, False, buffer), out)
    torch.testing.assert_close(buffer, x[..., -3:])


def test_conv_reference_with_packed_rows(conv):
    from causal_conv1d import causal_conv1d_fn
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    seq_idx = torch.tensor([[-1, 0, 0, 0, 3, 3, -1, 5, -1], [2] * 9], device=conv["x"].device)
    arguments = (conv["x"], conv["weight"], conv["bias"])
    got = causal_conv1d_fn(*arguments, seq_idx, conv["state"], True, None, "silu")
    expected = causal_conv1d_ref(*arguments, conv["state"], True, None, "silu", seq_idx)
    torch.testing.assert_close(got, expected)


def test_conv_extension_forward(conv):
    import causal_conv1d_cuda
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    fwd = causal_conv1d_cuda.causal_conv1d_fwd
    x, weight, bias, state = conv["x"], conv["weight"], conv["bias"], conv["state"]
    expected = causal_conv1d_ref(x, weight, bias, activation="silu")
    torch.testing.assert_close(fwd(x, weight, bias, True), expected)
    torch.testing.assert_close(fwd(x, weight, bias, None, True), expected)
    expected, expected_final = causal_conv1d_ref(x, weight, bias, state, True, activation="silu")
    final, out = torch.empty_like(state), torch.empty_like(x)
    torch.testing.assert_close(fwd(x, weight, bias, None, state, final, True), expected)
    torch.testing.assert_close(final, expected_final)
    assert fwd(x, weight, bias, None, state, out, final.zero_(), True) is None
    torch.testing.assert_close((out, final), (expected, expected_final))
    with pytest.raises(TypeError, match="4, 5, 7 or 8"):
        fwd(x, weight, bias)


def test_conv_extension_backward(conv):
    import causal_conv1d_cuda
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    bwd = causal_conv1d_cuda.causal_conv1d_bwd
    x, weight, bias, dout, state = conv.values()

    def expected(*states):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, *states)]
        causal_conv1d_ref(*leaves, activation="silu").backward(dout)
        return [leaf.grad for leaf in leaves]

    torch.testing.assert_close(bwd(x, weight, bias, dout, None, True), expected())
    torch.testing.assert_close(bwd(x, weight, bias, dout, None, None, True), expected())
    got = bwd(x, weight, bias, dout, None, state, None, None, True, True)
    torch.testing.assert_close(got, expected(state))
    dx = torch.empty_like(x)
    assert bwd(x, weight, bias, dout, None, state, None, dx, False, True)[0] is dx
    into = [torch.empty_like(x), torch.ones_like(weight), torch.ones_like(bias), state.clone()]
    assert bwd(x, weight, bias, dout, None, state, None, *into, True) is None
    dx, dweight, dbias, dstate = expected(state)
    torch.testing.assert_close(into, [dx, dweight + 1, dbias + 1, dstate])


@pytest.mark.parametrize("count", [5, 6, 7, 8])
def test_conv_extension_update(conv, count):
    import causal_conv1d_cuda
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_update_ref

    x, weight, bias = conv["x"][..., 0], conv["weight"], conv["bias"]
    state = torch.cat([conv["state"], conv["state"][..., :1]], dim=-1)
    expected_state, out = state.clone(), torch.empty_like(x)
    expected = causal_conv1d_update_ref(x, expected_state, weight, bias, "silu")
    arguments = [x, state, weight, bias, True, None, None][:count]
    if count == 8:
        arguments.insert(4, out)
    result = causal_conv1d_cuda.causal_conv1d_update(*arguments)
    assert (result is None) == (count == 8)
    torch.testing.assert_close(out if count == 8 else result, expected)
    torch.testing.assert_close(state, expected_state)


def test_update_reference_as_ring(conv):
    from causal_conv1d import causal_conv1d_update
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_update_ref

    x, weight, bias = conv["x"], conv["weight"], conv["bias"]
    state = torch.cat([conv["state"], conv["state"]], dim=-1)[..., :5].contiguous()
    expected_state = state.clone()
    seqlens = torch.tensor([7, 3], device=x.device, dtype=torch.int32)
    got = causal_conv1d_update(x, state, weight, bias, "silu", cache_seqlens=seqlens)
    expected = causal_conv1d_update_ref(x, expected_state, weight, bias, "silu", seqlens)
    torch.testing.assert_close((got, state), (expected, expected_state))


def test_varlen_states(conv):
    from causal_conv1d.causal_conv1d_varlen import (
        causal_conv1d_varlen_states,
        causal_conv1d_varlen_states_ref,
    )

    x = conv["x"][0].t()  # (9, 6)
    bounds = torch.tensor([0, 0, 2, 9], device=x.device, dtype=torch.int32)
    expected = causal_conv1d_varlen_states_ref(x, bounds, 4)
    assert torch.equal(causal_conv1d_varlen_states(x, bounds, 4), expected)


@pytest.mark.parametrize("gated", [False, True])
def test_scan_extension(device, gated):
    import selective_scan_cuda
    from mamba_ssm.ops.selective_scan_interface import SelectiveScanFn, selective_scan_ref

    torch.manual_seed(0)
    shapes = [(2, 4, 10), (2, 4, 10), (4, 3), (2, 1, 3, 10), (2, 1, 3, 10), (4,), (2, 4, 10), (4,)]
    u, delta, A, B, C, D, z, bias = (torch.randn(shape).to(device) for shape in shapes)
    A = -A.abs()
    inputs = [u, delta, A, B, C, D, z if gated else None, bias]
    leaves = [t if t is None else t.clone().requires_grad_() for t in inputs]
    expected, last_state = selective_scan_ref(*leaves, True, True)
    dout = torch.randn_like(expected)
    expected.backward(dout)

    out, x, *out_z = selective_scan_cuda.fwd(*inputs, True)
    assert x.shape == (2, 4, 1, 6) and len(out_z) == gated
    torch.testing.assert_close(x[:, :, -1, 1::2], last_state.detach())
    torch.testing.assert_close((out_z or [out])[0], expected.detach())
    dz = torch.empty_like(u) if gated else None
    *gradients, last = selective_scan_cuda.bwd(*inputs, dout, x, out, dz, True, gated)
    names = ["du", "ddelta", "dA", "dB", "dC", "dD", "ddelta_bias"] + ["dz"] * gated
    if gated:
        torch.testing.assert_close(last, expected.detach())
        assert gradients[7] is dz
    else:
        gradients.append(last)
    order = [0, 1, 2, 3, 4, 5, 7] + [6] * gated
    for name, gradient, i in zip(names, gradients, order, strict=True):
        torch.testing.assert_close(gradient, leaves[i].grad, rtol=1e-4, atol=1e-5, msg=name)

    applied, state = SelectiveScanFn.apply(*inputs, True, True)
    torch.testing.assert_close(applied, expected.detach())
    torch.testing.assert_close(state, last_state.detach())
    assert isinstance(SelectiveScanFn.apply(*inputs, True, None), torch.Tensor)


@pytest.mark.parametrize("kind", ["real", "complex", "constant B and C"])
def test_references_agree_with_operations(device, kind):
    from mamba_ssm.ops import selective_scan_interface as interface

    torch.manual_seed(0)
    dim, dstate, rank, seqlen = 4, 3, 2, 7
    factor = 2 if kind == "complex" else 1
    A = -torch.rand(dim, dstate, device=device) - 0.5
    if kind == "complex":
        A = torch.complex(A, torch.randn_like(A))

    def randn(*shape):
        return torch.randn(shape, device=device)

    constant = kind.startswith("constant")
    rows = rank + (0 if constant else 2 * factor * dstate)
    B, C = (randn(dim, dstate), randn(dim, dstate)) if constant else (None, None)
    arguments = [randn(2, 2 * dim, seqlen), randn(dim, 1, 4), randn(dim), randn(rows, dim)]
    arguments += [randn(dim, rank), randn(5, dim), randn(5), A, B, C, randn(dim), randn(dim)]
    got = interface.mamba_inner_fn(*arguments)
    torch.testing.assert_close(interface.mamba_inner_ref(*arguments), got, rtol=1e-4, atol=1e-4)

    if not constant:
        B, C = randn(2, 2, dstate, factor * seqlen), randn(2, 2, dstate, factor * seqlen)
    scan = [randn(2, dim, seqlen), randn(2, dim, seqlen), A, B, C, randn(dim)]
    scan += [randn(2, dim, seqlen), randn(dim), True, True]
    torch.testing.assert_close(
        interface.selective_scan_ref(*scan),
        interface.selective_scan_fn(*scan),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("heads", [False, True])
def test_state_update_reference(device, heads):
    from mamba_ssm.ops.triton.selective_state_update import (
        selective_state_update,
        selective_state_update_ref,
    )

    torch.manual_seed(0)
    channels, groups = ((4, 6), (2,)) if heads else ((6,), ())

    def randn(*shape):
        return torch.randn(shape, device=device)

    state = randn(3, *channels, 5)
    expected_state = state.clone()
    arguments = [randn(3, *channels), randn(3, *channels), -randn(*channels, 5).abs()]
    arguments += [randn(3, *groups, 5), randn(3, *groups, 5), randn(*channels)]
    arguments += [randn(3, *channels), randn(*channels), True]
    got = selective_state_update(state, *arguments)
    expected = selective_state_update_ref(expected_state, *arguments)
    torch.testing.assert_close((got, state), (expected, expected_state))


def test_rms_norm_forward(device):
    from mamba_ssm.ops.selective_scan_interface import rms_norm_forward

    x, weight, bias = (torch.randn(s, device=device) for s in ((3, 8), (8,), (8,)))
    norm = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(rms_norm_forward(x, weight, None), norm * weight)
    torch.testing.assert_close(rms_norm_forward(x, weight, bias), norm * weight + bias)
    expected = torch.nn.functional.layer_norm(x, (8,), weight, bias, 1e-6)
    torch.testing.assert_close(rms_norm_forward(x, weight, bias, is_rms_norm=False), expected)
