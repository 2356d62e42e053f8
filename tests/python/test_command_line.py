"""`mamba-ssm` and `python -m mamba_ssm`: help, exit codes, the doctor, a small demo, and what the
benchmark compares with. Training, generation and conversion have files of their own."""

import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from mamba_ssm import __version__, _startup, bench, bench_workload, demo, doctor
from mamba_ssm.__main__ import main
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

ROOT = pathlib.Path(__file__).parents[2]


def test_doctor_finds_nothing():
    assert main(["doctor"]) == 0


def test_doctor_notices(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "silu", lambda x: x)
    assert main(["doctor"]) != 0
    assert "FAILED" in capsys.readouterr().out


def test_doctor_measures(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "TESTS", [])
    monkeypatch.setattr(_startup, "LAYERS", ("Mamba2",))
    assert main(["doctor", "--times"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"import mamba_ssm, after torch: [0-9.]+ s", output)
    assert re.search(r"cpu +generate, Mamba2: first call [0-9.]+ ms, then [0-9.]+ ms", output)


def test_doctor_tests_every_op():
    schemas = torch._C._jit_get_all_schemas()
    ops = {s.name.partition("::")[2] for s in schemas if s.name.startswith("mamba_ssm::")}
    tested = {re.sub(", backward", "_bwd", name) for name, _ in doctor.TESTS}
    # Those are what the tests of the others run, or what chooses among them.
    parts = ("_fwd", "_out", "_traced", "_prenorm")
    assert tested == {op for op in ops if not op.endswith(parts)} - {"step_linear"}


@pytest.mark.parametrize("layer", ["Mamba", "Mamba2"])
def test_demo(layer, tmp_path, capsys):
    """A few steps: it learns from a text, keeps a checkpoint and generates from it."""
    text = ROOT / "tests" / "harness" / "cases.py"
    arguments = ["--layer", layer, "--text", str(text), "--out", str(tmp_path)]
    assert main(["demo", *arguments, "--minutes", "0.05", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "7968" in output and "6468320" in output
    before, after = (float(n) for n in re.findall(r"held out: ([0-9.]+) bits per byte", output))
    assert after < before
    assert (tmp_path / "checkpoint" / "model.safetensors").exists()


COMMANDS = ["demo", "train", "generate", "bench", "doctor", "convert"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    output = capsys.readouterr().out
    assert stop.value.code == 0 and f"examples:\n  mamba-ssm {command}" in output


def test_top_level(capsys):
    assert main([]) == 2
    assert "{" + ",".join(COMMANDS) + "}" in capsys.readouterr().out
    for arguments, code in (
        (["--version"], 0),
        (["--help"], 0),
        (["fly"], 2),
        (["bench", "-x"], 2),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
    assert __version__ in capsys.readouterr().out
    assert main(["--cmake-dir"]) == 0
    folder = pathlib.Path(capsys.readouterr().out.strip())
    assert (folder / "mamba_ssmConfig.cmake").is_file()


def test_program():
    """The installed program is this one, and -m runs it too."""
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="mamba-ssm")
    assert script.load() is main
    command = [sys.executable, "-m", "mamba_ssm", "--version"]
    assert subprocess.check_output(command, text=True).strip() == __version__


@pytest.mark.parametrize(
    "error, code",
    [
        (OSError("no disk"), 1),
        (ValueError("no number"), 1),
        (RuntimeError("no memory"), 1),
        (ImportError("no package"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failures(error, code, monkeypatch, capsys):
    """A sentence and an exit code."""

    def fail(report):
        raise error

    monkeypatch.setitem(bench.GROUPS, "cpu", fail)
    assert main(["bench", "cpu"]) == code
    told = f"mamba-ssm bench: {error}\n" if str(error) else ""
    assert capsys.readouterr().err == told


def test_wrong_arguments(tmp_path, monkeypatch, capsys):
    assert main(["bench", "nothing"]) == 2
    assert "unknown group 'nothing'" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "scan"]) == 2
    assert "sees no GPU" in capsys.readouterr().err
    out = ["--out", str(tmp_path / "out")]
    assert main(["demo", *out, "--text", str(tmp_path / "missing")]) == 2
    assert "missing" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["demo", *out, "--minutes", "-1"])
    assert stop.value.code == 2


def test_demo_needs_the_program_it_was_given(tmp_path):
    with pytest.raises(demo.ArgumentError, match="does not exist"):
        demo.find_cpp_example(tmp_path / "missing")


def test_plain_versions_compute_the_same():
    """What the benchmark is compared with computes what the library does."""
    inputs = bench_workload.ssd_inputs(2, 64, 6, 8, 2, 5, "cpu", torch.float64)
    inputs = [t.double() for t in inputs]
    x, dt, A, B, C, D = inputs
    exact = mamba_chunk_scan_combined(x, dt, A, B, C, 64, D=D)
    for chunk_size in (16, 32):
        plain = bench_workload.ssd_dense_chunks(*inputs, chunk_size=chunk_size)
        torch.testing.assert_close(plain, exact)
    inputs = bench_workload.scan_inputs(2, 6, 20, 3, "cpu", torch.float64)
    inputs = [t.double() for t in inputs]
    exact = selective_scan_fn(*inputs, delta_softplus=True)
    torch.testing.assert_close(bench_workload.time_loop(*inputs), exact)
