"""Loads the two shared libraries that register ``torch.ops.mamba_ssm``.

``libmamba_ssm_ops.so`` holds the kernels and uses torch's stable ABI; ``libmamba_ssm.so`` holds
derivatives, composites and the C++ modules, and belongs to one minor version of torch.
"""

from pathlib import Path

import torch

LIBRARY_DIR = Path(__file__).parent / "lib"
OPS_LIBRARY = LIBRARY_DIR / "libmamba_ssm_ops.so"
LIBRARY = LIBRARY_DIR / "libmamba_ssm.so"


def _load_library(path: Path) -> None:
    if not path.is_file():
        raise ImportError(
            f"mamba_ssm: {path} does not exist. The package was imported from its source tree or "
            "its installation is incomplete; install it with `pip install .` in the root of the "
            "repository and import it from another folder."
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"mamba_ssm: {path} cannot be loaded into torch {torch.__version__}: {error}"
        ) from error


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _load() -> None:
    _load_library(OPS_LIBRARY)
    from mamba_ssm._build_info import TORCH_VERSION

    if _minor(torch.__version__) != _minor(TORCH_VERSION):
        raise ImportError(
            f"mamba_ssm: this installation was built for torch {TORCH_VERSION}, but torch "
            f"{torch.__version__} is running. Install torch {_minor(TORCH_VERSION)} or build "
            "mamba_ssm again for the running version."
        )
    _load_library(LIBRARY)


_load()
