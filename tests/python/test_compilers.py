"""What torch's compilers, exporters and transforms make of every op and module.

Each test is one cell of README's table "Compilers": rows are programs, columns what is done with
them. "yes": results, gradients and updated states of eager mode; "error": an error that says what
is missing; "-": there is nothing to do. What a run found is printed at its end.
"""

import copy
import dataclasses
import functools
import importlib.util
import io
import pathlib
import re
import subprocess
import sys
import tempfile
import warnings
from typing import Any

import pytest
import test_registry
import torch
from harness import cases
from mamba_ssm import Mamba, Mamba2, MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.modules.block import Block
from mamba_ssm.ops.triton.layer_norm import RMSNorm
from mamba_ssm.utils.generation import InferenceParams
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

README = pathlib.Path(__file__).parents[2] / "README.md"
# (batch, seqlen); programs of one token differ in batch alone.
SIZES = [(2, 21), (3, 7), (2, 8), (5, 16), (4, 19), (8, 32), (7, 33), (6, 40), (9, 64), (10, 71)]
SIZES += [(11, 2), (12, 3), (13, 9), (14, 10), (15, 11), (16, 12), (17, 13), (18, 63), (19, 65)]
SIZES += [(1, 1)]
FEW_SIZES = [(3, 7), (5, 33), (2, 64)]


@dataclasses.dataclass
class Program:
    """A module, and the tensors that it is called with."""

    module: torch.nn.Module
    inputs: Any  # (batch, seqlen) to a list of tensors
    differentiable: tuple[int, ...] = ()  # which of them want gradients
    mutable: tuple[int, ...] = ()  # which of them a call updates
    trains: bool = True

    def run(self, call, inputs, parameters, backward=torch.Tensor.backward):
        """Results, updated inputs and gradients of `call`, which stands for the module."""
        inputs = [tensor.detach().clone() for tensor in inputs]
        leaves = []
        if self.trains:
            leaves = [inputs[i].requires_grad_() for i in self.differentiable]
            leaves += parameters
        for leaf in leaves:
            leaf.grad = None
        with torch.set_grad_enabled(self.trains):
            results = tensors(call(*inputs))
            if leaves:
                backward(loss(results))
        updated = [inputs[i] for i in self.mutable]
        gradients = [leaf.grad for leaf in leaves]
        return [tensor.detach().clone() for tensor in (*results, *updated, *gradients)]

    def compare(self, call, sizes=FEW_SIZES, parameters=None, **options):
        """`parameters`: those of `call`, in order; None: the module's own."""
        own = list(self.module.parameters())
        for size in sizes:
            inputs = self.inputs(*size)
            expected = self.run(self.module, inputs, own)
            torch.compiler.cudagraph_mark_step_begin()
            parameters = own if parameters is None else parameters
            results = self.run(call, inputs, parameters, **options)
            for value, wanted in zip(results, expected, strict=True):
                assert_close(value, wanted)

    def dynamic_shapes(self):
        """For torch.export: the sizes that are not the same in every call."""
        small, large = self.inputs(2, 5), self.inputs(3, 7)
        return tuple(
            {
                dim: torch.export.Dim.DYNAMIC
                for dim, sizes in enumerate(zip(a.shape, b.shape))
                if sizes[0] != sizes[1]
            }
            for a, b in zip(small, large)
        )


def assert_close(value, expected):
    """Up to roundings: sums of gradients may have another order."""
    size = float(expected.abs().max()) if expected.numel() else 0
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6 * max(1, size))


def tensors(results):
    return [r for r in torch.utils._pytree.tree_leaves(results) if r is not None]


def loss(results):
    return sum(r.abs().square().sum() for r in results)


# Rows -------------------------------------------------------------------------------------------

OPS = {
    "causal_conv1d": cases.Conv(),
    "causal_conv1d_update": cases.ConvUpdate(num_slots=24),
    "causal_conv1d_varlen_states": cases.VarlenStates(),
    "selective_scan": cases.Scan(),
    "selective_state_update": cases.StateUpdate(num_slots=24),
    "ssd_chunk_scan": cases.Ssd(),
    "rms_norm_gated": cases.NormGated(),
    "layer_norm": cases.LayerNorm(),
    "decode_linear": cases.DecodeLinear(),
    "decode_linear_prenorm": cases.DecodeLinearPrenorm(),
    "mamba_inner": cases.Inner(),
    "mamba2_inner": cases.Inner2(),
}


class Op(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.op = call.function()
        self.names = [n for n, v in call.arguments.items() if isinstance(v, torch.Tensor)]
        self.options = {n: v for n, v in call.arguments.items() if n not in self.names}

    def forward(self, *tensors):
        results = self.op(**dict(zip(self.names, tensors)), **self.options)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(r for r in results if r is not None)


def op_program(name, device):
    case = OPS[name]

    def call(batch, seqlen):
        sizes = {"batch": batch, "seqlen": seqlen, "total_tokens": seqlen}
        sizes["leading"] = (batch, seqlen)
        sizes["rows"] = batch
        own = {n: size for n, size in sizes.items() if getattr(case, n, None) is not None}
        return dataclasses.replace(case, **own).call(device)

    example = call(2, 5)
    module = Op(example)
    return Program(
        module,
        lambda *size: [call(*size).arguments[name] for name in module.names],
        tuple(module.names.index(name) for name in example.differentiable),
        tuple(module.names.index(name) for name in example.mutable),
        trains=bool(example.differentiable),
    )


def mixer(kind, device, **options):
    options |= {"headdim": 4} if kind is Mamba2 else {}
    return kind(16, d_state=4, device=device, **options)


def module_program(module, device):
    return Program(module, lambda *size: [torch.randn(*size, 16, device=device)], (0,))


def language_model(layer, device):
    options = {"headdim": 4} if layer == "Mamba2" else {}
    config = MambaConfig(
        d_model=16, n_layer=2, vocab_size=50, ssm_cfg={"layer": layer, "d_state": 4, **options}
    )
    return MambaLMHeadModel(config, device=device)


def tokens(*size, device):
    return torch.randint(50, size, device=device)


class Step(torch.nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden_states, *states):
        return self.mixer.step(hidden_states, *states)[0]


class ModelStep(torch.nn.Module):
    """A token for each row, with the two states of every layer."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, *states):
        params = InferenceParams(max_seqlen=8, max_batch_size=input_ids.shape[0], seqlen_offset=1)
        params.key_value_memory_dict = {i: states[2 * i : 2 * i + 2] for i in range(2)}
        return self.model(input_ids, inference_params=params).logits


def step_program(module, device):
    def inputs(batch, _):
        states = module.mixer.allocate_inference_cache(batch, 8)
        states = [torch.randn_like(state) for state in states]
        return [torch.randn(batch, 1, 16, device=device), *states]

    return Program(module, inputs, mutable=(1, 2), trains=False)


def model_step_program(module, device):
    def inputs(batch, _):
        cache = module.model.allocate_inference_cache(batch, 8)
        states = [torch.randn_like(state) for layer in cache.values() for state in layer]
        return [tokens(batch, 1, device=device), *states]

    return Program(module, inputs, mutable=(1, 2, 3, 4), trains=False)


def block(device):
    return Block(
        16,
        lambda dim: mixer(Mamba2, device),
        norm_cls=lambda dim: RMSNorm(dim, device=device),
        residual_in_fp32=True,
    )


MODULES = {
    "Mamba": lambda device: module_program(mixer(Mamba, device), device),
    "Mamba2": lambda device: module_program(mixer(Mamba2, device), device),
    "Block": lambda device: module_program(block(device), device),
    "MambaLMHeadModel": lambda device: Program(
        language_model("Mamba1", device), lambda *size: [tokens(*size, device=device)]
    ),
    "Mamba.step": lambda device: step_program(Step(mixer(Mamba, device)), device),
    "Mamba2.step": lambda device: step_program(Step(mixer(Mamba2, device)), device),
    "MambaLMHeadModel, a token": lambda device: model_step_program(
        ModelStep(language_model("Mamba2", device)), device
    ),
}


def program_of(row, device):
    return op_program(row, device) if row in OPS else MODULES[row](device)


# Columns: each raises AssertionError where a result differs from eager mode. -----------------------


def check_compile(program, _):
    """Forward and backward of twenty sizes: no graph break, at most two recompilations."""
    torch._dynamo.reset()
    counters.clear()
    mode = "reduce-overhead" if program.inputs(1, 1)[0].is_cuda else None
    compiled = torch.compile(program.module, fullgraph=True, dynamic=True, mode=mode)
    program.compare(compiled, SIZES)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3
    assert not counters["graph_break"]


def exported(program, strict=False):
    shapes = program.dynamic_shapes()
    if isinstance(program.module, (Op, Step, ModelStep)):  # forward has *arguments
        first = 0 if isinstance(program.module, Op) else 1
        shapes = (*shapes[:first], shapes[first:])
    inputs = tuple(tensor.clone() for tensor in program.inputs(4, 12))
    with torch.set_grad_enabled(program.trains):
        return torch.export.export(program.module, inputs, dynamic_shapes=shapes, strict=strict)


def check_export(program, _):
    for strict in (True, False):
        program.compare(exported(program, strict).module())


PACKAGE_OF_TORCH = """
import sys, torch
x = torch.ones(1, 2)
with torch.no_grad():
    program = torch.export.export(torch.nn.Linear(2, 2), (x,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
    torch._inductor.aoti_load_package(package)(x)
"""


@functools.cache
def packages_load():
    """Of torch alone: those of 2.11 crash unless CXX links them with -Bsymbolic (see README)."""
    if torch.__version__ >= torch.torch_version.TorchVersion("2.13"):
        return True
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "package.pt2"
        return not subprocess.run([sys.executable, "-c", PACKAGE_OF_TORCH, file]).returncode


def check_aoti(program, tmp_path):
    if not packages_load():
        pytest.skip("this torch loads no package, not even one without our operations")
    program.trains = False
    package = torch._inductor.aoti_compile_and_package(
        exported(program), package_path=str(tmp_path / "package.pt2")
    )
    program.compare(torch._inductor.aoti_load_package(package))


def check_trace(program, _):
    inputs = tuple(tensor.clone() for tensor in program.inputs(4, 12))
    with torch.set_grad_enabled(program.trains), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sizes are compared, and that TorchScript is old
        # Calls that are compared with the trace would start from updated states.
        traced = torch.jit.trace(program.module, inputs, check_trace=not program.mutable)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    program.compare(loaded, parameters=list(loaded.parameters()))


def check_functional_call(program, _):
    parameters = {n: p.detach().clone().requires_grad_() for n, p in module_parameters(program)}
    blank = copy.deepcopy(program.module)
    with torch.no_grad():
        for parameter in blank.parameters():
            parameter.zero_()
    program.compare(
        lambda *inputs: torch.func.functional_call(blank, parameters, inputs),
        parameters=list(parameters.values()),
    )


def module_parameters(program):
    named = list(program.module.named_parameters())
    if not named:
        raise NothingToDo
    return named


class NothingToDo(Exception):
    pass


def check_checkpoint(program, _):
    if not program.trains:
        raise NothingToDo
    for use_reentrant in (False, True) if program.differentiable else (False,):
        program.compare(functools.partial(checkpoint, program.module, use_reentrant=use_reentrant))


def check_compiled_autograd(program, _):
    if not program.trains:
        raise NothingToDo
    torch._dynamo.reset()

    counters.clear()
    with torch._dynamo.config.patch(compiled_autograd=True):
        backward = torch.compile(torch.Tensor.backward, dynamic=True, backend="aot_eager")
        program.compare(program.module, FEW_SIZES[:2], backward=backward)
    assert counters["compiled_autograd"]["captures"]


def check_func_grad(program, _):
    if not program.trains:
        raise NothingToDo
    inputs = program.inputs(*FEW_SIZES[0])
    parameters = {name: p.detach() for name, p in program.module.named_parameters()}

    def function(leaves, parameters):
        arguments = list(inputs)
        for i, leaf in zip(program.differentiable, leaves):
            arguments[i] = leaf
        results = torch.func.functional_call(program.module, parameters, tuple(arguments))
        return loss(tensors(results))

    leaves = [inputs[i] for i in program.differentiable]
    gradients = tensors(torch.func.grad(function, argnums=(0, 1))(leaves, parameters))
    expected = program.run(program.module, inputs, list(program.module.parameters()))
    for value, wanted in zip(gradients, expected[-len(gradients) :], strict=True):
        assert_close(value, wanted)


def check_vmap(program, _):
    size = FEW_SIZES[0]
    rows = [program.inputs(*size) for _ in range(3)]
    stacked = Program(
        program.module,
        lambda *_: [torch.stack(row) for row in zip(*rows)],
        program.differentiable,
        program.mutable,
        program.trains,
    )

    def loop(*inputs):
        results = [tensors(program.module(*row)) for row in zip(*inputs)]
        return tuple(torch.stack(row) for row in zip(*results))

    def batched(*inputs):
        return tuple(tensors(torch.vmap(program.module)(*inputs)))

    inputs = stacked.inputs()
    own = list(program.module.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no batching rule: a loop runs
        results = stacked.run(batched, inputs, own)
    for value, wanted in zip(results, stacked.run(loop, inputs, own), strict=True):
        assert_close(value, wanted)


def check_onnx(program, tmp_path):
    inputs = tuple(program.inputs(*FEW_SIZES[0]))
    dynamo = importlib.util.find_spec("onnxscript") is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(program.module, inputs, str(tmp_path / "model.onnx"), dynamo=dynamo)


COLUMNS = {
    "compile": check_compile,
    "export": check_export,
    "AOTInductor": check_aoti,
    "TorchScript": check_trace,
    "functional_call": check_functional_call,
    "checkpoint": check_checkpoint,
    "compiled autograd": check_compiled_autograd,
    "vmap": check_vmap,
    "func.grad": check_func_grad,
    "ONNX": check_onnx,
}
SLOW = {(row, "compiled autograd") for row in (*MODULES, "mamba_inner", "mamba2_inner")}
SLOW |= {("MambaLMHeadModel", "compile")}
# What an error has to say.
SENTENCES = {
    "vmap": "Batching rule not implemented for mamba_ssm::",
    "func.grad": r"cannot use C\+\+ torch::autograd::Function with functorch transforms|"
    r"to use an autograd.Function with functorch transforms .*must override the setup_context",
    "ONNX": r"(No ONNX function found for|Error when translating node) .*mamba_ssm\.|"
    "unrecognized namespace mamba_ssm::",
}


def outcome(row, column, device, tmp_path):
    try:
        COLUMNS[column](program_of(row, device), tmp_path)
    except NothingToDo:
        return "-"
    except Exception as error:
        if not re.search(SENTENCES.get(column, "(?!)"), str(error), re.DOTALL):
            raise
        return "error"
    return "yes"


def expected_cells():
    """(row, column, content) of README's table; slow ones are left to --full."""
    table = README.read_text(encoding="utf-8").partition("## Compilers")[2].partition("\n## ")[0]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    header, _, *rows = lines
    assert header[1:] == list(COLUMNS), header
    assert [row.strip("`") for row, *_ in rows] == [*OPS, *MODULES]
    return [
        pytest.param(
            name,
            column,
            content,
            marks=[pytest.mark.full] if (name, column) in SLOW else [],
        )
        for row, *contents in rows
        for name in [row.strip("`")]
        for column, content in zip(header[1:], contents, strict=True)
    ]


def test_every_op_has_a_row():
    parts = ("_fwd", "_bwd", "_out")  # of others, whose rows run them; steps run step_linear
    ops = {op for op in test_registry.OPS if not op.startswith("step_")}
    assert set(OPS) == {op for op in ops if not op.endswith(parts)}


@pytest.mark.parametrize("row, column, expected", expected_cells())
def test_cell(row, column, expected, device, tmp_path, record_cell):
    found = outcome(row, column, device, tmp_path)
    record_cell(row, column, device, found)
    assert found == expected


@pytest.mark.parametrize("op", OPS)
def test_profiler_ranges(op, device):
    """Ranges of the forward and of the backward have the names of ops."""
    program = op_program(op, device)
    with torch.profiler.profile() as profile:
        program.run(program.module, program.inputs(2, 5), [])
    names = {event.name for event in profile.events() if event.name.startswith("mamba_ssm::")}
    assert f"mamba_ssm::{op}" in names
    assert any("_bwd" in name for name in names) == program.trains
