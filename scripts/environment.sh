# Sourced by the scripts beside it: finds or makes what a build needs, then builds and installs.
#
# Python packages go into the active environment if it has torch, else into .venv; never into a
# system Python. System packages are installed when that is possible without asking, else named.

torch_version=2.13.0  # what a fresh .venv gets
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$root/build/scripts
cd "$root"

say() { printf '\n== %s\n' "$*"; }
give_up() { printf '%s\n' "$*" >&2; exit 2; }

# install_packages NAME...: Debian or Ubuntu packages, or the command that would install them.
install_packages() {
  local as_root=
  command -v apt-get >/dev/null || give_up "Missing: $*. Install them with your system's package manager."
  if [ "$(id -u)" -ne 0 ]; then
    sudo -n true 2>/dev/null && as_root=sudo || give_up "Missing: $*. Run: sudo apt-get install $*"
  fi
  say "installing system packages: $*"
  export DEBIAN_FRONTEND=noninteractive
  $as_root apt-get update -qq
  $as_root apt-get install -y -qq "$@" >/dev/null
}

# The first of: an environment's python that has torch >= 2.10; .venv, made and filled here.
find_python() {
  local has_torch='
import sys, os
assert sys.version_info >= (3, 10)
assert sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ
import torch
assert tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 10)'
  if python3 -c "$has_torch" 2>/dev/null; then
    python=$(command -v python3)
    return
  fi
  python=$root/.venv/bin/python
  "$python" -c "$has_torch" 2>/dev/null && return
  [ "$installed" = no ] || give_up "--installed: no Python environment with torch >= 2.10 is active."
  command -v python3 >/dev/null || install_packages python3 python3-venv
  python3 -c 'import sys; assert sys.version_info >= (3, 10)' ||
    give_up "Python 3.10 or newer is needed, this is $(python3 --version)."
  if [ ! -x "$python" ]; then
    python3 -c 'import ensurepip' 2>/dev/null || install_packages python3-venv
    python3 -m venv "$root/.venv"
  fi
  say "installing torch $torch_version into .venv (200 MB for the CPU build, about 3 GB with CUDA)"
  "$python" -m pip install -q "torch==$torch_version"
}

# need_modules MODULE=REQUIREMENT...: installs the requirements whose modules cannot be imported.
need_modules() {
  local pair missing=()
  for pair in "$@"; do
    "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('${pair%%=*}') is None)" ||
      missing+=("${pair#*=}")
  done
  [ ${#missing[@]} -eq 0 ] && return
  say "installing Python packages: ${missing[*]}"
  "$python" -m pip install -q "${missing[@]}"
}

need_compiler() {
  command -v c++ >/dev/null || install_packages g++
  local cmake_version
  cmake_version=$(cmake --version 2>/dev/null | sed -n 's/.*version \([0-9.]*\).*/\1/p')
  if ! printf '3.25\n%s\n' "${cmake_version:-0}" | sort -CV; then
    need_modules "cmake=cmake>=3.25"
  fi
  command -v ninja >/dev/null || need_modules ninja=ninja
  PATH=$(dirname "$python"):$PATH
}

have_header() { printf '#include <%s>\n' "$1" | c++ -std=c++17 -E -x c++ - >/dev/null 2>&1; }

need_json() { have_header nlohmann/json.hpp || install_packages nlohmann-json3-dev; }

need_utf8proc() { have_header utf8proc.h || install_packages libutf8proc-dev; }

# Catch2 3. Debian 12 has it in its backports only.
need_catch2() {
  have_header catch2/catch_test_macros.hpp && return
  local release
  release=$(. /etc/os-release 2>/dev/null && echo "${VERSION_CODENAME:-}")
  if [ "$release" = bookworm ] && [ -f /etc/apt/sources.list.d/debian.sources ] && [ "$(id -u)" -eq 0 ]; then
    sed -n '1,/^$/p' /etc/apt/sources.list.d/debian.sources |
      sed 's/^Suites:.*/Suites: bookworm-backports/' > /etc/apt/sources.list.d/backports.sources
    install_packages -t bookworm-backports libcatch2-dev
  else
    install_packages catch2
  fi
}

# run_build TESTS COMMAND...: builds both distributions through pip COMMAND; the build tree stays, so that
# the next run compiles only what changed. Without a GPU one architecture shows that CUDA compiles. With TESTS
# ON warnings are errors: in users' builds a newer compiler may have more.
run_build() {
  need_modules scikit_build_core=scikit-build-core pybind11=pybind11
  if [ -z "${MAMBA_SSM_CUDA_ARCHS:-}" ] && ! nvidia-smi -L >/dev/null 2>&1; then
    export MAMBA_SSM_CUDA_ARCHS=90-real
  fi
  say "building mamba_ssm and causal_conv1d: pip $2"
  local log=$build-$2.log
  mkdir -p "$(dirname "$build")"
  if ! MAMBA_SSM_EXAMPLES=${MAMBA_SSM_EXAMPLES:-ON} MAMBA_SSM_TESTS=$1 "$python" -m pip "${@:2}" -v --no-deps \
      --no-build-isolation -Cbuild-dir="$build" -Ccmake.define.CMAKE_COMPILE_WARNING_AS_ERROR="$1" \
      . ./python/causal_conv1d >"$log" 2>&1; then
    tail -n 60 "$log" >&2
    give_up "The build failed; its whole output is in $log."
  fi
  grep -E '^ *-- (mamba_ssm|  )' "$log" | sed 's/^ *-- //' || true
}

build_and_install() { run_build "${1:-OFF}" install --force-reinstall; }
