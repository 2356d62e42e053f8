"""The two registrations of autograd and Meta, native and in Python, and the choice between them."""

import os
import pathlib
import subprocess
import sys

import pytest
import test_opcheck
import torch
from harness import cases, compare, poison
from mamba_ssm import _library, doctor

TESTS = pathlib.Path(__file__).parents[1]
HAS_NATIVE = (
    _library.LIBRARY.is_file() and _library._minor(torch.__version__) == _library._built_for()
)
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason=f"no libmamba_ssm.so: {_library.MODE}")
needs_python = pytest.mark.skipif(_library.NATIVE, reason="MAMBA_SSM_REGISTRATION is not python")


def run(program, registration=None, check=True):
    """The output of a Python program that imports mamba_ssm with a registration."""
    environment = {k: v for k, v in os.environ.items() if k != _library.VARIABLE}
    if registration is not None:
        environment[_library.VARIABLE] = registration
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS / "python")])
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.returncode == 0) == check, result.stderr
    return result.stdout if check else result.stderr


# The choice -------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("registration", [None, "native"])
def test_native(registration):
    mode = run(
        "from mamba_ssm import _library; print(_library.NATIVE, _library.MODE)", registration
    )
    assert mode == "True autograd and Meta are libmamba_ssm.so's\n"


def test_python():
    mode = run("from mamba_ssm import _library; print(_library.NATIVE, _library.MODE)", "python")
    sentence = "autograd and Meta are registered in Python: MAMBA_SSM_REGISTRATION is python"
    assert mode == f"False {sentence}\n"


ANOTHER_TORCH = """
import sys, types
sys.modules["mamba_ssm._build_info"] = types.ModuleType("mamba_ssm._build_info")
sys.modules["mamba_ssm._build_info"].TORCH_VERSION = "2.10.1"
import mamba_ssm
print(mamba_ssm._library.MODE)
"""


def test_another_torch():
    """Than that of libmamba_ssm.so: the registration in Python, and native on demand is an error."""
    sentence = "autograd and Meta are registered in Python: libmamba_ssm.so is built for torch 2.10"
    assert run(ANOTHER_TORCH) == f"{sentence}\n"
    error = run(ANOTHER_TORCH, "native", check=False)
    assert f"is built for torch 2.10 and torch {torch.__version__} is running" in error
    assert "ImportError: mamba_ssm: MAMBA_SSM_REGISTRATION is native, but" in error


def test_without_the_native_library(monkeypatch, tmp_path):
    monkeypatch.delenv(_library.VARIABLE, raising=False)
    monkeypatch.setattr(_library, "LIBRARY", tmp_path / "libmamba_ssm.so")
    assert _library._why_python() == "libmamba_ssm.so is not installed"


def test_unknown_registration():
    error = run("import mamba_ssm", "cpp", check=False)
    assert 'MAMBA_SSM_REGISTRATION must be "native" or "python", got "cpp"' in error


def test_no_bindings():
    """Neither do they load, nor is there a crash: they would register everything again."""
    error = run("from mamba_ssm import _C", "python", check=False)
    sentence = "ImportError: mamba_ssm._C, the C++ modules, needs libmamba_ssm.so and torch "
    assert sentence in error
    program = "import sys; sys.modules['safetensors.torch'] = None; import mamba_ssm; "
    program += "from mamba_ssm.utils._safetensors import save_safetensors; save_safetensors({}, '')"
    assert "`pip install safetensors`" in run(program, "python", check=False)


def test_the_doctor_says_which(capsys):
    doctor.print_versions()
    assert f"registration    {_library.MODE}\n" in capsys.readouterr().out


# The two are the same ---------------------------------------------------------------------------

SCHEMAS = """
import torch, mamba_ssm
schemas = map(str, torch._C._jit_get_all_schemas())
print("\\n".join(sorted(s for s in schemas if s.startswith("mamba_ssm::"))))
"""


@needs_native
def test_same_schemas():
    schemas = run(SCHEMAS, "python")
    assert schemas == run(SCHEMAS, "native")
    assert "mamba_ssm::mamba2_inner(" in schemas and "mamba_ssm::layer_norm_traced(" in schemas


def compared_cases():
    """Those of opcheck, all types and layouts among them; composites add in another order."""
    return {
        sample.id: case
        for sample in test_opcheck._samples()
        for case, gradients in [sample.values]
        if case.differentiable == () or gradients
        if case.op not in ("mamba_inner", "mamba2_inner")
    }


def write_outcomes(path):
    outcomes = {}
    for label, case in compared_cases().items():
        outcome = compare.run(case.call())
        outcomes[label] = (outcome.results, outcome.gradients)
    torch.save(outcomes, path)


@needs_native
def test_same_bits(tmp_path):
    """And the same layouts, of results, updated states and gradients."""
    outcomes = []
    for registration in ("native", "python"):
        path = tmp_path / registration
        run(f"import test_registration as t; t.write_outcomes({str(path)!r})", registration)
        outcomes.append(torch.load(path))
    native, python = outcomes
    assert len(native) > 100 and native.keys() == python.keys()
    for label, parts in native.items():
        for expected, got in zip(parts, python[label], strict=True):
            assert expected.keys() == got.keys()
            for name, value in expected.items():
                assert poison.same_bits(got[name], value), (label, name)
                assert got[name].stride() == value.stride(), (label, name)


# The registration in Python is used ---------------------------------------------------------------


@needs_python
@pytest.mark.parametrize(
    "stem", ["causal_conv1d", "selective_scan", "ssd_chunk_scan", "layer_norm"]
)
def test_planted_wrong_gradient(stem, monkeypatch):
    from mamba_ssm import _registration

    test = dict(doctor.TESTS)[f"{stem}, backward"]
    assert doctor.passes("cpu", stem, test)
    right = _registration._gradients
    monkeypatch.setattr(
        _registration,
        "_gradients",
        lambda name: [n.replace("x", "y").replace("u", "y") for n in right(name)],
    )
    assert not doctor.passes("cpu", stem, test)


@needs_python
def test_planted_wrong_fake(monkeypatch):
    from mamba_ssm import _registration

    call = cases.NormGated().call()
    arguments = {n: v.clone() if torch.is_tensor(v) else v for n, v in call.arguments.items()}
    check = [call.function(), (), arguments]
    torch.library.opcheck(*check, test_utils="test_faketensor")
    monkeypatch.setattr(_registration, "_rows", lambda like, dtype=None: like.new_empty(3))
    with pytest.raises(Exception, match="Fake|fake|shape"):
        torch.library.opcheck(*check, test_utils="test_faketensor")


@needs_python
def test_undifferentiable_update_of_a_leaf():
    call = cases.ConvUpdate().call()
    state = call.arguments["conv_state"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        call.invoke(conv_state=state)


@needs_python
@pytest.mark.parametrize(
    "case, argument, spoiled",
    [
        (cases.Conv(), "x", lambda t: t[0]),
        (cases.VarlenStates(), "cu_seqlens", lambda t: t[None]),
        (cases.Scan(), "A", lambda t: t[0]),
        (cases.Ssd(), "B", lambda t: t[0]),
    ],
    ids=lambda value: getattr(value, "op", None),
)
def test_fakes_check_what_they_read(case, argument, spoiled):
    call = case.call()
    arguments = {n: v.to("meta") if torch.is_tensor(v) else v for n, v in call.arguments.items()}
    with pytest.raises(RuntimeError, match=f"{case.op}: {argument} must have shape"):
        call.function()(**(arguments | {argument: spoiled(arguments[argument])}))
