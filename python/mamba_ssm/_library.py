"""Registers ``torch.ops.mamba_ssm``.

``libmamba_ssm_ops.so`` holds the kernels and uses torch's stable ABI. Autograd, Meta and composites
come from ``libmamba_ssm.so``, which also holds the C++ modules and belongs to one minor version of
torch, or, with any other torch, from `_registration`, in Python.

The environment variable MAMBA_SSM_REGISTRATION chooses: "native" or "python".
"""

import importlib.abc
import os
import sys
from pathlib import Path

import torch

LIBRARY_DIR = Path(__file__).parent / "lib"
OPS_LIBRARY = LIBRARY_DIR / "libmamba_ssm_ops.so"
LIBRARY = LIBRARY_DIR / "libmamba_ssm.so"
VARIABLE = "MAMBA_SSM_REGISTRATION"


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


def _check_torch() -> None:
    if tuple(map(int, _minor(torch.__version__).split("."))) < (2, 10):
        raise ImportError(
            f"mamba_ssm: torch {torch.__version__} is running; torch 2.10 or newer is needed."
        )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _built_for() -> str:
    """The minor version of torch that libmamba_ssm.so belongs to."""
    from mamba_ssm._build_info import TORCH_VERSION

    return _minor(TORCH_VERSION)


def _why_python() -> str:
    """Why the registration is that in Python; empty where it is libmamba_ssm.so's."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "native", "python"):
        raise ImportError(f'mamba_ssm: {VARIABLE} must be "native" or "python", got "{wanted}"')
    if wanted == "python":
        return f"{VARIABLE} is python"
    if not LIBRARY.is_file():
        reason = f"{LIBRARY.name} is not installed"
    elif _minor(torch.__version__) != _built_for():
        reason = f"{LIBRARY.name} is built for torch {_built_for()}"
    else:
        return ""
    if wanted == "native":
        raise ImportError(
            f"mamba_ssm: {VARIABLE} is native, but {reason} and torch {torch.__version__} is "
            f"running. Install torch {_built_for()}, build mamba_ssm again for the "
            f"running version, or unset {VARIABLE}."
        )
    return reason


class _NoBindings(importlib.abc.MetaPathFinder):
    """Makes the import of mamba_ssm._C say why there is none: it would load libmamba_ssm.so."""

    def find_spec(self, fullname, path, target=None):
        if fullname == "mamba_ssm._C":
            raise ImportError(
                f"mamba_ssm._C, the C++ modules, needs {LIBRARY.name} and torch "
                f"{_built_for()}, but {MODE}."
            )


def _load() -> tuple[bool, str]:
    """Registers everything. Whether libmamba_ssm.so does it, and a sentence that says who does."""
    _check_torch()
    _load_library(OPS_LIBRARY)
    reason = _why_python()
    if not reason:
        _load_library(LIBRARY)
        return True, f"autograd and Meta are {LIBRARY.name}'s"
    from mamba_ssm import _registration

    _registration.register()
    sys.meta_path.insert(0, _NoBindings())
    return False, f"autograd and Meta are registered in Python: {reason}"


NATIVE, MODE = _load()
