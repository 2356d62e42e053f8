"""Every registered operation has all its parts; the libraries ask of others only what they may."""

import collections
import pathlib
import platform
import re
import shutil
import subprocess

import mamba_ssm
import pytest
import torch
from mamba_ssm import _registration
from mamba_ssm.ops import _composites

ROOT = pathlib.Path(__file__).parents[2]
OPS_LIBRARY = pathlib.Path(mamba_ssm.__file__).parent / "lib" / "libmamba_ssm_ops.so"
SCHEMAS = sorted(
    (
        schema
        for schema in torch._C._jit_get_all_schemas()
        # What torch.jit.trace records is the op of the same stem.
        if schema.name.startswith("mamba_ssm::") and not schema.name.endswith("_traced")
    ),
    key=lambda schema: schema.name,
)
OPS = [schema.name.removeprefix("mamba_ssm::") for schema in SCHEMAS]
# What a derivative does not take: layer_norm's starts from the sum of its inputs, which it is given.
UNREAD = {"layer_norm_bwd": {"x", "residual", "x1", "prenorm", "residual_in_fp32"}}
# Made of other ops, in any backend.
COMPOSITES = ("mamba_inner", "mamba2_inner", "step_linear", "step_linear_prenorm")


def stem(op):
    """The op whose files hold `op`: derivatives and variants live with their base."""
    base = re.sub(r"(_fwd|_bwd|_prenorm)?(_out)?$", "", op)
    base = re.sub(r"^step_linear$", "decode_linear", base)
    return "causal_conv1d" if base.startswith("causal_conv1d") else base


def keys(op):
    """Dispatch keys with a kernel of their own."""
    dump = torch._C._dispatch_dump(f"mamba_ssm::{op}")
    return set(re.findall(r"^(\w+)(?:\[alias\])?:", dump, re.MULTILINE))


def test_there_are_ops():
    assert {"causal_conv1d", "causal_conv1d_update", "causal_conv1d_varlen_states"} <= set(OPS)
    assert {"selective_scan", "selective_state_update", "mamba_inner"} <= set(OPS)
    assert {"ssd_chunk_scan", "rms_norm_gated", "layer_norm", "mamba2_inner"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_kernels(op):
    if op in COMPOSITES:
        assert "CompositeExplicitAutograd" in keys(op) or "CompositeImplicitAutograd" in keys(op)
    else:
        assert {"CPU", "Meta"} <= keys(op), torch._C._dispatch_dump(f"mamba_ssm::{op}")
        assert ("CUDA" in keys(op)) == ("CUDA" in keys("causal_conv1d"))  # all or none
    assert keys(op) & {"Autograd", "AutogradCPU", "CompositeImplicitAutograd"}, (
        f"{op} has no Autograd kernel: a backward through it would be silently absent"
    )


@pytest.mark.parametrize("op", OPS)
def test_any_layout(op):
    """Inductor copies nothing to give an operation other strides."""
    assert torch.Tag.flexible_layout in getattr(torch.ops.mamba_ssm, op).default.tags


@pytest.mark.parametrize("schema", SCHEMAS, ids=OPS)
def test_schema(schema):
    """Results are fresh; what a call writes to is marked; derivatives name what they derive."""

    def schema_of(name):
        return next(s for s in SCHEMAS if s.name == name)

    op = schema.name.removeprefix("mamba_ssm::")
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert bool(written) == op.endswith(("_update", "_out"))
    assert not any(r.alias_info for r in schema.returns)
    if op.endswith("_out"):
        base = schema_of(schema.name.removesuffix("_out"))
        assert not schema.returns
        assert [a.name for a in base.arguments] + written == [a.name for a in schema.arguments]
        assert written == [r.name for r in base.returns]
    if op.endswith("_bwd"):
        assert schema.arguments[0].name == "dout"
        forward = schema_of(schema.name.removesuffix("_bwd"))
        needed = {a.name for a in forward.arguments} - UNREAD.get(op, set())
        assert needed <= {a.name for a in schema.arguments}


def files_to_add():
    """Of CONTRIBUTING's table, with X for the name of an op."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Add an op")[2]
    rows = re.findall(r"^\| (`.*`) \|", text, re.MULTILINE)
    return [path for row in rows for path in re.findall(r"`([^`]+)`", row)]


def test_table_of_files():
    assert {"csrc/kernels/X.h", "csrc/autograd/X.cpp", "README.md"} <= set(files_to_add())


@pytest.mark.parametrize("op", OPS)
def test_files(op):
    of_kernels = ("csrc/kernels/X", "csrc/ops/X", "tests/cpp/kernels/test_X")
    missing = [
        path
        for path in files_to_add()
        if not (op in COMPOSITES and path.startswith(of_kernels))
        and not list(ROOT.glob(path.replace("X", stem(op))))
    ]
    assert not missing


@pytest.mark.parametrize("op", OPS)
def test_registered_in_python(op):
    assert op in (_composites.OPS if op in COMPOSITES else _registration.FAKES)


@pytest.mark.parametrize("op", OPS)
def test_declared_for_cpp(op):
    if op.endswith(("_fwd", "_bwd", "_out")):
        return
    header = (ROOT / "csrc/include/mamba_ssm/ops.h").read_text()
    assert re.search(rf"\b{op}\(", header)


@pytest.mark.parametrize("op", OPS)
def test_a_test_names_it(op):
    tests = [p for p in (ROOT / "tests/python").glob("test_*.py") if p.name != "test_registry.py"]
    tests += list((ROOT / "tests/harness").glob("*.py"))
    assert any(re.search(rf"\b{op}\b", path.read_text()) for path in tests)
    own = f"test_{stem(op)}"
    assert any(path.stem.startswith(own) for path in tests)


@pytest.mark.parametrize("op", OPS)
def test_readme_has_a_row(op):
    if op.endswith(("_fwd", "_bwd", "_out")):
        return
    readme = (ROOT / "README.md").read_text()
    assert re.search(rf"^\|.*\b{op}\b.*\|", readme, re.MULTILINE)


# Symbols ----------------------------------------------------------------------------------------


def _lines(tool, *options):
    if not shutil.which(tool):
        pytest.skip(f"needs {tool}")
    command = [tool, *options, str(OPS_LIBRARY)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_ops_library_uses_the_stable_abi_alone():
    undefined = _lines("nm", "-DC", "--undefined-only")
    assert any("aoti_torch_" in symbol for symbol in undefined)
    assert not [s for s in undefined if re.search(r"\b(at|c10|torch|caffe2)::", s)]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="about the instruction sets of x86")
def test_wide_instructions_stay_in_their_namespaces():
    """No function outside avx2:: and avx512:: uses their registers: a processor without them runs
    it, be it a template of the standard library that was compiled with their flags."""
    wide = collections.defaultdict(set)
    function = None
    for line in _lines("objdump", "-dC", "--no-show-raw-insn"):
        if match := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = match[1]
        elif match := re.search(r"%([yz])mm\d", line):
            wide["avx512" if match[1] == "z" else "avx2"].add(function)
    assert wide
    assert not [f for f in wide["avx512"] if "kernels::avx512::" not in f]
    assert not [f for f in wide["avx2"] if not re.search("kernels::(avx2|avx512)::", f)]
