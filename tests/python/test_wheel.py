"""scripts/check_wheel.py: it accepts a wheel of what is installed, and refuses doctored ones."""

import importlib.metadata
import importlib.util
import pathlib
import shutil
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("check_wheel", ROOT / "scripts" / "check_wheel.py")
check_wheel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_wheel)
OPS, MODULES = check_wheel.OPS, check_wheel.MODULES
RECORD = "mamba_ssm/_build_info.py"

pytestmark = pytest.mark.skipif(
    not (shutil.which("readelf") and shutil.which("nm")), reason="needs readelf and nm"
)


def contents(distribution):
    """Of the wheel that was installed: its files by name, and its tag."""
    installed = importlib.metadata.distribution(distribution)
    of_pip = ("INSTALLER", "REQUESTED", "direct_url.json")  # and programs, and compiled Python
    names = [str(file) for file in installed.files or ()]
    names = [n for n in names if not n.startswith("..") and not n.endswith((".pyc", *of_pip))]
    if f"{distribution}/__init__.py" not in names:
        pytest.skip("an editable install: it has no files of its own")
    files = {name: pathlib.Path(installed.locate_file(name)).read_bytes() for name in names}
    tag = installed.read_text("WHEEL").partition("Tag: ")[2].split()[0]
    return files, f"{distribution}-{installed.version}-{tag}.whl"


@pytest.fixture
def doctored(tmp_path):
    """doctored(changes, distribution, name): the problems with a wheel in which files are replaced;
    those whose content is None are left out."""

    def check(changes, distribution="mamba_ssm", name=None, **options):
        files, own_name = contents(distribution)
        path = tmp_path / (name(own_name) if name else own_name)
        with zipfile.ZipFile(path, "w") as archive:
            for file, content in (files | changes).items():
                if content is not None:
                    archive.writestr(file, content)
        found = check_wheel.problems(path, **options)
        # scripts/build_wheel installs that tool; without it there is one thing less to check.
        return [sentence for sentence in found if sentence != check_wheel.NO_CUOBJDUMP]

    return check


def changed(file, old, new):
    """The file with other bytes of the same length."""
    content = contents("mamba_ssm")[0][file]
    assert len(old) == len(new) and old in content
    return {file: content.replace(old, new)}


@pytest.mark.parametrize("distribution", ["mamba_ssm", "causal_conv1d"])
def test_wheel(distribution, doctored):
    assert doctored({}, distribution) == []


def test_a_file_too_many(doctored):
    assert doctored({"mamba_ssm/tests/test_ops.py": b""}) == [
        "mamba_ssm/tests/test_ops.py does not belong there"
    ]
    (found,) = doctored({"tests/test_conv.py": b""}, "causal_conv1d")
    assert found == "tests/test_conv.py does not belong there"


@pytest.mark.parametrize(
    "name",
    [
        "mamba_ssm/ops/selective_scan_interface.py",
        "mamba_ssm/bench_peer.json",
        "mamba_ssm/include/mamba_ssm/nn/mamba.h",
        "mamba_ssm/include/mamba_ssm/version.h",
        "mamba_ssm/lib/cmake/mamba_ssm/mamba_ssmConfig.cmake",
        "selective_scan_cuda/__init__.py",
        OPS,
        MODULES,
    ],
)
def test_a_missing_file(name, doctored):
    assert f"{name} is missing" in doctored({name: None})


def test_folders_of_the_build(doctored):
    name = "mamba_ssm/lib/cmake/mamba_ssm/mamba_ssm_nnTargets.cmake"
    (found,) = doctored({name: f"{ROOT}/build".encode()})
    assert found == f"{name} names {ROOT}"


def test_links(doctored):
    found = doctored(changed(OPS, b"libtorch_cpu.so", b"libcudart_x.so."))
    assert f"{OPS} does not need libtorch_cpu.so" in found
    assert f"{OPS} needs libcudart_x.so." in found
    runpath = b"$ORIGIN:$ORIGIN/../../torch/lib"
    (found,) = doctored(changed(MODULES, runpath, b"/build/:$ORIGIN/../../torch/lib"))
    assert found.startswith(f"{MODULES} has the RUNPATH ['/build/:")


def test_symbols_that_are_asked_for(doctored):
    (found,) = doctored(changed(OPS, b"aoti_torch_get_stride\0", b"_ZN2at6detail5emptyEv\0"))
    assert found == f"{OPS} asks for at::detail::empty(), which is not in torch's stable ABI"


def test_symbols_that_are_visible(doctored):
    files = contents("mamba_ssm")[0]
    found = doctored({OPS: files[MODULES], MODULES: files[OPS]})
    assert any(sentence.startswith(f"{OPS} lets others see mamba_ssm::") for sentence in found)
    assert f"{MODULES} has no visible symbols" in found
    found = doctored(changed(MODULES, b"N9mamba_ssm", b"N9mumba_ssm"))
    assert any(sentence.startswith(f"{MODULES} lets others see mumba_ssm::") for sentence in found)


def test_gpu_architectures_without_code(doctored):
    record = contents("mamba_ssm")[0][RECORD].decode()
    if 'CUDA_ARCHS = ""' in record:
        changes, text = record.replace('ARCHS = ""', 'ARCHS = "90-real"'), "has no CUDA code"
    else:
        changes, text = 'CUDA_ARCHS = ""\n', "has CUDA code"
    (found,) = doctored({RECORD: changes.encode()})
    assert found.endswith(text)


@pytest.mark.parametrize(
    "archs, elf, ptx, problem",
    [
        ("75-real;120", "75 120", "120", None),
        ("90-real", "90 90a", "", None),
        ("90", "90 90a", "90 90a", None),
        ("75-real;120", "75 120", "", "has PTX for [], not ['sm_120']"),
        ("75-real;90-real", "90 90a", "", "has code for ['sm_90', 'sm_90a'], not ['sm_75', "),
        ("90-real", "90", "", "has code for ['sm_90'], not ['sm_90', 'sm_90a']"),
        ("90-real", "90 90a 75", "", "has code for ['sm_75', "),
    ],
)
def test_gpu_architectures(archs, elf, ptx, problem, tmp_path, monkeypatch):
    """What cuobjdump lists, by a stand-in, against the record of the build."""
    tool = tmp_path / "cuobjdump"
    tool.write_text(
        f'#!/bin/sh\nkind=cubin list="{elf}"\n[ "$1" = --list-elf ] || kind=ptx list="{ptx}"\n'
        'for arch in $list; do echo "ELF file    1: a.1.sm_$arch.$kind"; done\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(check_wheel, "_run", lambda *command: "[12] .nv_fatbin PROGBITS")
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / RECORD).write_text(f'CUDA_ARCHS = "{archs}"\n')
    found = check_wheel._gpu_architectures(tmp_path)
    assert len(found) == (problem is not None)
    assert not problem or problem in found[0]


def test_gpu_architectures_without_cuobjdump(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(check_wheel, "_package_folders", lambda name: [])
    monkeypatch.setattr(check_wheel, "_run", lambda *command: "[12] .nv_fatbin PROGBITS")
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / RECORD).write_text('CUDA_ARCHS = "90-real"\n')
    assert check_wheel._gpu_architectures(tmp_path) == [check_wheel.NO_CUOBJDUMP]


def test_size(doctored):
    (found,) = doctored({}, max_megabytes=1)
    assert found.startswith("it has ") and found.endswith("MB, more than 1")


def test_tags(doctored):
    files, name = contents("mamba_ssm")
    for_one_python = any(check_wheel.BINDINGS.fullmatch(file) for file in files)
    python = name.split("-")[2:4]
    other = ["py3", "none"] if for_one_python else ["cp311", "cp311"]
    found = doctored({}, name=lambda name: name.replace("-".join(python), "-".join(other)))
    assert any(sentence.startswith("its name says ") for sentence in found)
    assert any("module for one Python" in sentence for sentence in found)
    found = doctored({}, "causal_conv1d", name=lambda name: name.replace("any", "linux_x86_64"))
    assert "it is tagged for platform linux_x86_64" in found
