"""Checks that a wheel of mamba_ssm or causal_conv1d holds what it should, and nothing else.

    python scripts/check_wheel.py dist/*.whl

Prints a line for each problem; the exit code is 1 with any. Needs readelf and nm, and cuobjdump where
the wheel has CUDA kernels.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_MEGABYTES = 100  # what package indexes take
NO_CUOBJDUMP = "its GPU architectures cannot be checked without cuobjdump"

SYSTEM = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
SYSTEM |= {"ld-linux-aarch64.so.1", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
RUNPATH = "$ORIGIN:$ORIGIN/../../torch/lib"
OPS, MODULES = "mamba_ssm/lib/libmamba_ssm_ops.so", "mamba_ssm/lib/libmamba_ssm.so"
BINDINGS = re.compile(r"mamba_ssm/_C\..*\.so")
# What a library must ask for, and may ask for besides SYSTEM; its RUNPATH. Python loads torch without
# making its symbols global, so that each names the libraries it uses. CUDA's runtime is linked in.
LINKS = {
    OPS: ({"libtorch.so", "libtorch_cpu.so"}, set(), RUNPATH),
    MODULES: (
        {"libmamba_ssm_ops.so", "libtorch.so", "libtorch_cpu.so", "libc10.so"},
        set(),
        RUNPATH,
    ),
    "_C": (
        {"libmamba_ssm.so", "libtorch_python.so"},
        {"libmamba_ssm_ops.so", "libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so"}
        | {"libc10_cuda.so"},
        "$ORIGIN/lib:$ORIGIN/../torch/lib",
    ),
}
CMAKE = "mamba_ssm/lib/cmake/mamba_ssm/"
CMAKE_FILES = {f"{CMAKE}mamba_ssm{name}.cmake" for name in ("Config", "ConfigVersion")}
CMAKE_FILES |= {
    f"{CMAKE}mamba_ssm_{component}Targets{suffix}.cmake"
    for component in ("ops", "nn")
    for suffix in ("", "-release")
}


def problems(path, max_megabytes=MAX_MEGABYTES):
    """One sentence for each thing that is wrong with the wheel at `path`."""
    path = Path(path)
    megabytes = path.stat().st_size / 1e6
    found = []
    if megabytes > max_megabytes:
        found.append(f"it has {megabytes:.1f} MB, more than {max_megabytes}")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
        names = {name for name in archive.namelist() if not name.endswith("/")}
        tree = Path(folder)
        found += _names(path.name, tree, names)
        found += _files(path.name, names)
        found += _build_folders(tree, names)
        for name in sorted(names):
            if name in LINKS or BINDINGS.fullmatch(name):
                found += _links(tree / name, name)
        if OPS in names:
            found += _ops_symbols(tree / OPS)
            found += _gpu_architectures(tree)
        if MODULES in names:
            found += _modules_symbols(tree / MODULES)
    return found


def _names(wheel, tree, names):
    """The name of the file, the tag inside, and whether the content depends on Python."""
    metadata = [name for name in names if name.endswith(".dist-info/WHEEL")]
    if len(metadata) != 1:
        return [f"it has {len(metadata)} files .dist-info/WHEEL"]
    # A name may join several platforms, which are tags of their own inside.
    inside = re.findall(r"^Tag: (.*)$", (tree / metadata[0]).read_text(), re.MULTILINE)
    python, abi, platforms = wheel.removesuffix(".whl").split("-")[-3:]
    tags = {f"{python}-{abi}-{platform}" for platform in platforms.split(".")}
    found = [] if set(inside) == tags else [f"its name says {sorted(tags)}, WHEEL {sorted(inside)}"]
    for_one_python = any(map(BINDINGS.fullmatch, names))
    if for_one_python == (python == "py3"):
        has = "has" if for_one_python else "has no"
        found.append(f"it is tagged {python}-{abi} and {has} module for one Python")
    if (platforms == "any") == (OPS in names):
        found.append(f"it is tagged for platform {platforms}")
    return found


def _files(wheel, names):
    """Against the files of the repository."""
    info = "-".join(wheel.split("-")[:2]) + ".dist-info/"
    expected = {info + name for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    if wheel.startswith("causal_conv1d-"):
        packages = ROOT / "python/causal_conv1d"
        expected |= _sources(packages, "causal_conv1d*/**/*.py")
    else:
        packages = ROOT / "python"
        expected |= _sources(packages, "mamba_ssm/**/*.py", "selective_scan_cuda/*.py")
        expected |= _sources(packages, "mamba_ssm/*.json") | CMAKE_FILES
        headers = _sources(ROOT / "csrc/include", "**/*.h") | {"mamba_ssm/version.h"}
        expected |= {f"mamba_ssm/include/{header}" for header in headers}
        expected |= {OPS, MODULES, "mamba_ssm/_build_info.py", info + "entry_points.txt"}
    unexpected = {name for name in names - expected if not BINDINGS.fullmatch(name)}
    return [f"{name} is missing" for name in sorted(expected - names)] + [
        f"{name} does not belong there" for name in sorted(unexpected)
    ]


def _sources(folder, *patterns):
    files = (file for pattern in patterns for file in folder.glob(pattern))
    return {file.relative_to(folder).as_posix() for file in files}


def _build_folders(tree, names):
    """Folders of the machine that built it, in any file."""
    folders = {str(ROOT), *_package_folders("torch")}
    if sys.prefix != sys.base_prefix:
        folders.add(sys.prefix)
    return [
        f"{name} names {folder}"
        for name in sorted(names)
        for folder in sorted(folders)
        if f"{folder}/".encode() in (tree / name).read_bytes()
    ]


def _package_folders(name):
    """Of a package of this Python, without importing it; as sys.path has them, and resolved."""
    spec = importlib.util.find_spec(name)
    folders = spec.submodule_search_locations or () if spec else ()
    return {variant for folder in folders for variant in (folder, str(Path(folder).resolve()))}


def _run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _links(library, name):
    required, allowed, runpath = LINKS.get(name, LINKS["_C"])
    dynamic = _run("readelf", "-d", "-W", str(library))
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    found = [f"{name} does not need {other}" for other in sorted(required - needed)]
    found += [f"{name} needs {other}" for other in sorted(needed - required - allowed - SYSTEM)]
    paths = re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", dynamic)
    if paths != [runpath]:
        found.append(f"{name} has the RUNPATH {paths}, not {runpath}")
    return found


def _symbols(library, *options):
    """(type, name) of the dynamic symbols."""
    lines = _run("nm", "-DC", *options, str(library)).splitlines()
    return [match.groups() for line in lines if (match := re.match(r"[0-9a-f ]* (\w) (.*)", line))]


def _visible(library):
    """What others may link to: neither templates that all may share (weak), nor the linker's marks."""
    symbols = _symbols(library, "--defined-only")
    marks = {"__bss_start", "_edata", "_end"}
    return [name for kind, name in symbols if kind not in "WVwvu" and name not in marks]


def _ops_symbols(library):
    """Of torch the stable ABI, which is C, alone; visible is what the library of modules asks for."""
    asked_for = {"mamba_ssm_decode_linear_tile_rows"}
    found = []
    for _, symbol in _symbols(library, "--undefined-only"):
        if re.search(r"\b(at|c10|torch|caffe2)::", symbol):
            found.append(f"{OPS} asks for {symbol}, which is not in torch's stable ABI")
    return found + [f"{OPS} lets others see {n}" for n in _visible(library) if n not in asked_for]


def _modules_symbols(library):
    """The C++ API is visible, what it is made of not."""
    visible = _visible(library)
    ours = any("mamba_ssm::" in name for name in visible)
    found = [] if ours else [f"{MODULES} has no visible symbols"]
    for name in visible:
        if not re.search(r"\bmamba_ssm::", name) or "mamba_ssm::kernels::" in name:
            found.append(f"{MODULES} lets others see {name}")
    return found


def _gpu_architectures(tree):
    """Those that the record of the build names, in the library; 90 also as 90a, for its wgmma."""
    record = (tree / "mamba_ssm/_build_info.py").read_text()
    archs = re.search(r'^CUDA_ARCHS = "(.*)"$', record, re.MULTILINE)[1]
    cubins, ptx = set(), set()
    for arch in filter(None, archs.split(";")):
        number, _, kind = arch.partition("-")
        for variant in {number, "90a" if number == "90" else number}:
            if kind != "virtual":
                cubins.add(f"sm_{variant}")
            if kind != "real":
                ptx.add(f"sm_{variant}")
    has_cuda = ".nv_fatbin" in _run("readelf", "-S", "-W", str(tree / OPS))
    if not archs or not has_cuda:
        says, has = "names" if archs else "names no", "has" if has_cuda else "has no"
        agree = has_cuda == bool(archs)
        return [] if agree else [f"_build_info.py {says} GPU architectures, {OPS} {has} CUDA code"]
    tools = [shutil.which("cuobjdump")]
    tools += [t for f in _package_folders("nvidia") for t in Path(f).glob("cu*/bin/cuobjdump")]
    tool = next(filter(None, tools), None)
    if not tool:
        return [NO_CUOBJDUMP]
    found = []
    for option, expected in (("--list-elf", cubins), ("--list-ptx", ptx)):
        listed = subprocess.run([tool, option, str(tree / OPS)], capture_output=True, text=True)
        got = set(re.findall(r"\.(sm_\w+)\.(?:cubin|ptx)", listed.stdout))
        if got != expected:
            what = "code" if option == "--list-elf" else "PTX"
            found.append(f"{OPS} has {what} for {sorted(got)}, not {sorted(expected)}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--max-megabytes", type=float, default=MAX_MEGABYTES)
    args = parser.parse_args()
    failed = False
    for wheel in args.wheels:
        found = problems(wheel, args.max_megabytes)
        failed |= bool(found)
        print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB: {'PROBLEMS' if found else 'ok'}")
        for sentence in found:
            print(f"  {sentence}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
