"""Whether what is installed of mamba_ssm and causal_conv1d is this project's, whole, and alone.

Upstream's distributions have the same names, so that pip replaces one by the other. They meet where
two installers or two folders of sys.path are at work: what is imported is then a matter of order.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

OPS_LIBRARY = "mamba_ssm/lib/libmamba_ssm_ops.so"
DISTRIBUTIONS = ("mamba_ssm", "causal_conv1d")
EXTENSIONS = {"selective_scan_cuda": "mamba_ssm", "causal_conv1d_cuda": "causal_conv1d"}


def problems(folders=None):
    """One sentence for each thing that is wrong in `folders` (None: sys.path), with its remedy.

    Found are distributions of others, compiled modules where ours are Python, packages that several
    folders have, and versions of ours that differ between metadata and package.
    """
    folders = _folders(sys.path if folders is None else folders)
    found = []
    for folder in folders:
        foreign = []
        for distribution in _distributions(folder):
            name, version = _name(distribution), distribution.version
            if not _is_ours(distribution):
                foreign += map(str, distribution.files or ())
                found.append(
                    f"{folder} has {name} {version} of another project: "
                    f"`pip uninstall {name}`, then install this one again."
                )
            elif (stated := _stated_version(folder / name)) not in (None, version):
                found.append(
                    f"{folder} has {name} {stated} with the metadata of {version}: "
                    f"`pip uninstall {name}`, delete {folder / name}, then install again."
                )
        for module, owner in EXTENSIONS.items():
            for path in sorted(folder.glob(f"{module}*.so")):
                if path.name not in foreign:
                    found.append(
                        f"{path} is compiled, and {module} of this project is not: "
                        f"delete it, or `pip uninstall {owner}` where it comes from."
                    )
    for package in (*DISTRIBUTIONS, *EXTENSIONS):
        first, *others = [f for f in folders if (f / package / "__init__.py").is_file()] or [None]
        for other in others:
            found.append(
                f"{package} is imported from {first} and also in {other}: uninstall one of them, "
                "or take its folder off sys.path."
            )
    return found


def without_cuda_kernels(cuda):
    """The sentence for a build without CUDA kernels beside a torch that uses a GPU, with its CUDA
    version, as "13.0": what to install, and to build again."""
    nvcc = find_nvcc()
    if nvcc:
        remedy = f"{nvcc} is there now"
    elif int(cuda.partition(".")[0]) >= 13:  # NVIDIA's packages have nvcc from CUDA 13 on
        remedy = f'`pip install "cuda-toolkit[nvcc,cccl]=={cuda}.*"`'
    else:
        remedy = f"install nvcc of the CUDA toolkit {cuda}"
    return (
        "torch uses a GPU here, and mamba_ssm was built without CUDA kernels, for want of nvcc: "
        f"{remedy}; then build and install mamba_ssm again."
    )


def find_nvcc():
    """Where a build would find nvcc (cmake/find_nvcc.cmake); None without."""
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    home = os.environ.get("CUDA_HOME")
    candidates = [
        os.environ.get("CUDACXX"),
        shutil.which("nvcc"),
        home and Path(home, "bin/nvcc"),
        *(path for folder in packages for path in sorted(folder.glob("cu*/bin/nvcc"))),
        Path("/usr/local/cuda/bin/nvcc"),
    ]
    return next((str(path) for path in candidates if path and Path(path).is_file()), None)


def _folders(paths):
    """Those that exist, each once, in order."""
    resolved = [Path(path or ".").resolve() for path in paths]
    return list(dict.fromkeys(folder for folder in resolved if folder.is_dir()))


def _name(distribution):
    return re.sub(r"[-_.]+", "_", distribution.metadata["Name"] or "").lower()


def _distributions(folder):
    found = importlib.metadata.distributions(path=[str(folder)])
    return sorted(
        (d for d in found if _name(d) in DISTRIBUTIONS), key=lambda d: (_name(d), d.version)
    )


def _is_ours(distribution):
    """mamba_ssm has our library; causal_conv1d, perhaps installed as links, needs mamba_ssm."""
    if _name(distribution) == "mamba_ssm":
        return OPS_LIBRARY in map(str, distribution.files or ())
    return any(re.match(r"mamba[-_.]ssm\b", need) for need in distribution.requires or ())


def _stated_version(package):
    """__version__ as the source of a package has it; None without."""
    source = package / "__init__.py"
    text = source.read_text(encoding="utf-8") if source.is_file() else ""
    stated = re.search(r'^__version__ = "(.*)"', text, re.MULTILINE)
    return stated and stated[1]
