"""What a build looks for in a Python environment, and what the doctor says where it found nothing."""

import argparse
import pathlib
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from mamba_ssm import _build_info, _installation, doctor

ROOT = pathlib.Path(__file__).parents[2]
PRINT = """\
list(APPEND CMAKE_MODULE_PATH "{root}/cmake")
include(find_nvcc)
message("compiler ${{CMAKE_CUDA_COMPILER}}")
message("packages ${{MAMBA_SSM_CUDA_PACKAGES}}")
message("problem ${{MAMBA_SSM_NVCC_PROBLEM}}")
"""


def write_nvcc(path, script="exit 0"):
    """A program called nvcc; and the runtime library beside its folder."""
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (path.parents[1] / "lib").mkdir()
    (path.parents[1] / "lib" / "libcudart_static.a").touch()
    return path


@pytest.fixture
def find_nvcc(tmp_path):
    """Runs cmake/find_nvcc.cmake with site-packages in tmp_path/site; returns what it sets."""

    cmake = shutil.which("cmake")
    if not cmake:
        pytest.skip("there is no cmake")

    def run(**environment):
        script = tmp_path / "print.cmake"
        script.write_text("cmake_minimum_required(VERSION 3.25)\n" + PRINT.format(root=ROOT))
        command = [cmake, f"-DPython_EXECUTABLE={sys.executable}", "-P", str(script)]
        environment = {"PATH": "/none", "PYTHONPATH": str(tmp_path / "site"), **environment}
        result = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert result.returncode == 0, result.stderr
        lines = [line.partition(" ") for line in result.stderr.splitlines()]
        return {name: value for name, _, value in lines}

    return run


def test_nvcc_of_packages(tmp_path, find_nvcc):
    write_nvcc(tmp_path / "site/nvidia/cu9/bin/nvcc")
    nvcc = write_nvcc(tmp_path / "site/nvidia/cu13/bin/nvcc")
    found = find_nvcc()
    assert found["compiler"] == str(nvcc) and found["packages"] == str(nvcc.parents[1])
    assert found["problem"] == ""


def test_nvcc_of_the_path_comes_first(tmp_path, find_nvcc):
    write_nvcc(tmp_path / "site/nvidia/cu13/bin/nvcc")
    home = write_nvcc(tmp_path / "home/bin/nvcc")
    found = find_nvcc(CUDA_HOME=str(tmp_path / "home"))
    assert found["compiler"] == str(home) and found["packages"] == ""
    path = write_nvcc(tmp_path / "path/nvcc")
    found = find_nvcc(CUDA_HOME=str(tmp_path / "home"), PATH=str(path.parent))
    assert found["compiler"] == str(path)


@pytest.mark.parametrize("part", ["version", "library"])
def test_packages_that_do_not_fit(part, tmp_path, find_nvcc):
    """As pip installs them: nvcc of one version, the others of the newest; or one is missing."""
    fails = 'echo "ptxas fatal: Unsupported .version 9.5" >&2; exit 1'
    nvcc = write_nvcc(
        tmp_path / "site/nvidia/cu13/bin/nvcc", fails if part == "version" else "exit 0"
    )
    if part == "library":
        (nvcc.parents[1] / "lib" / "libcudart_static.a").unlink()
    found = find_nvcc()
    assert found["compiler"] != str(nvcc) and found["packages"] == ""
    assert f"{nvcc} does not work" in found["problem"] and "pip install" in found["problem"]
    assert ("Unsupported .version" in found["problem"]) == (part == "version")


@pytest.fixture
def no_nvcc(monkeypatch):
    """Nothing that this machine has."""
    monkeypatch.setenv("PATH", "/none")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(_installation.importlib.util, "find_spec", lambda name: None)
    is_file = pathlib.Path.is_file
    monkeypatch.setattr(
        pathlib.Path, "is_file", lambda path: "/usr/local" not in str(path) and is_file(path)
    )


def test_what_to_install(no_nvcc, monkeypatch, tmp_path):
    assert _installation.find_nvcc() is None
    assert '`pip install "cuda-toolkit[nvcc,cccl]==13.0.*"`' in (
        _installation.without_cuda_kernels("13.0")
    )
    assert "nvcc of the CUDA toolkit 12.8" in _installation.without_cuda_kernels("12.8")
    nvcc = write_nvcc(tmp_path / "home/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert f"{nvcc} is there now" in _installation.without_cuda_kernels("13.0")


@pytest.mark.parametrize("archs", ["", "90-real"])
def test_the_doctor_says_so(archs, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "TESTS", [])
    monkeypatch.setattr(_build_info, "CUDA_ARCHS", archs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert doctor.run(argparse.Namespace(times=False)) == (not archs)
    said = "built without CUDA kernels" in capsys.readouterr().out
    assert said == (not archs)


def test_the_doctor_agrees_with_the_build(tmp_path, monkeypatch, find_nvcc):
    nvcc = write_nvcc(tmp_path / "site/nvidia/cu13/bin/nvcc")
    monkeypatch.setenv("PATH", "/none")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert _installation.find_nvcc() == find_nvcc()["compiler"] == str(nvcc)
