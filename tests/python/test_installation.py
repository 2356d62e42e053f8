"""What the doctor says of other installations, on folders that look like site-packages."""

import argparse
import subprocess
import sys

import pytest
from mamba_ssm import _installation, doctor

VERSIONS = {"mamba_ssm": "2.4.0", "causal_conv1d": "1.7.0"}
EXTENSION = "{}.cpython-311-x86_64-linux-gnu.so"


def install(folder, name, version=None, files=None, requires=(), record=True):
    """A distribution with these files, as pip leaves it."""
    version = version or VERSIONS[name.replace("-", "_")]
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    metadata = [f"Name: {name}", f"Version: {version}"]
    metadata += [f"Requires-Dist: {need}" for need in requires]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *metadata, ""]))
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(f'"""A package."""\n\n__version__ = "{version}"\n')
    if record:
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    return folder


def install_ours(folder, version=None):
    files = ["mamba_ssm/__init__.py", _installation.OPS_LIBRARY, "selective_scan_cuda/__init__.py"]
    install(folder, "mamba_ssm", version, files)
    files = ["causal_conv1d/__init__.py", "causal_conv1d_cuda/__init__.py"]
    return install(folder, "causal_conv1d", None, files, ["torch>=2.10", "mamba_ssm>=2.4.0"])


def install_upstream(folder, name, version, **options):
    extension = {"mamba": "selective_scan_cuda", "causal": "causal_conv1d_cuda"}[
        name[:6].strip("-_")
    ]
    files = [f"{name.replace('-', '_')}/__init__.py", EXTENSION.format(extension)]
    return install(folder, name, version, files, ["torch", "ninja"], **options)


def test_this_installation():
    assert _installation.problems() == []


def test_nothing_is_wrong(tmp_path):
    ours = install_ours(tmp_path / "a")
    other = install(tmp_path / "b", "mamba_ssm_extras", "1.0", ["mamba_ssm_extras/__init__.py"])
    assert _installation.problems([ours, other, ours, tmp_path / "none"]) == []
    assert _installation.problems([]) == []


@pytest.mark.parametrize("name", ["mamba-ssm", "mamba_ssm", "causal-conv1d", "causal_conv1d"])
@pytest.mark.parametrize("record", [False, True])
def test_upstream_alone(tmp_path, name, record):
    install_upstream(tmp_path, name, "1.5.0", record=record)
    first, *others = _installation.problems([tmp_path])
    plain = name.replace("-", "_")
    assert f"has {plain} 1.5.0 of another project: `pip uninstall {plain}`" in first
    assert len(others) == (
        not record
    )  # without a list of its files, the module is named for itself


def test_upstream_in_the_same_folder(tmp_path):
    install_ours(tmp_path)
    install_upstream(tmp_path, "mamba-ssm", "2.3.2")
    found = "\n".join(_installation.problems([tmp_path]))
    assert "mamba_ssm 2.3.2 of another project" in found
    # Its __init__.py lies over ours.
    assert "mamba_ssm 2.3.2 with the metadata of 2.4.0: `pip uninstall mamba_ssm`" in found


@pytest.mark.parametrize("module", ["selective_scan_cuda", "causal_conv1d_cuda"])
def test_forgotten_module(tmp_path, module):
    path = install_ours(tmp_path) / EXTENSION.format(module)
    path.touch()
    (found,) = _installation.problems([tmp_path])
    assert found.startswith(f"{path} is compiled") and "delete it, or `pip uninstall" in found


def test_two_copies(tmp_path):
    first, second = install_ours(tmp_path / "a"), install_ours(tmp_path / "b")
    found = _installation.problems([first, second])
    names = ("mamba_ssm", "causal_conv1d", "selective_scan_cuda", "causal_conv1d_cuda")
    assert [sentence.split()[0] for sentence in found] == list(names)
    assert all(f"from {first} and also in {second}: uninstall" in sentence for sentence in found)


def test_upstream_behind_ours(tmp_path):
    """In another folder, as of the system: shadowed, and still found."""
    ours = install_ours(tmp_path / "a")
    theirs = install_upstream(tmp_path / "b", "causal-conv1d", "1.6.1")
    found = _installation.problems([ours, theirs])
    assert any("causal_conv1d 1.6.1 of another project" in sentence for sentence in found)
    assert any("causal_conv1d is imported from" in sentence for sentence in found)
    assert not any("mamba_ssm is" in sentence for sentence in found)


def test_version_of_the_package(tmp_path):
    install_ours(tmp_path)
    (tmp_path / "causal_conv1d" / "__init__.py").write_text('__version__ = "1.7.1"\n')
    (found,) = _installation.problems([tmp_path])
    assert "causal_conv1d 1.7.1 with the metadata of 1.7.0" in found


def test_links_instead_of_files(tmp_path):
    """An editable installation of causal_conv1d has none of its own files."""
    install(tmp_path, "causal_conv1d", None, ["_causal_conv1d.pth"], ["mamba_ssm>=2.4.0"])
    assert _installation.problems([tmp_path]) == []


def test_the_doctor_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "TESTS", [])
    arguments = argparse.Namespace(times=False)
    assert doctor.run(arguments) == 0
    monkeypatch.syspath_prepend(install_upstream(tmp_path, "mamba-ssm", "2.2.4"))
    assert doctor.run(arguments) == 1
    output = capsys.readouterr().out
    assert "PROBLEM: " in output and "`pip uninstall mamba_ssm`" in output


def test_exit_code(tmp_path):
    """Of the command, with another causal_conv1d behind on the path."""
    install_upstream(tmp_path, "causal-conv1d", "1.6.1")
    program = f"import sys; sys.path.append({str(tmp_path)!r}); from mamba_ssm.__main__ import main"
    command = [sys.executable, "-c", program + "; sys.exit(main(['doctor']))"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "causal_conv1d 1.6.1 of another project" in result.stdout
    assert "0 of " in result.stdout
