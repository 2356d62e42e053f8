# Finds torch: a LibTorch on CMAKE_PREFIX_PATH, or the torch of the Python at hand.
if(NOT DEFINED Torch_DIR AND NOT DEFINED Torch_ROOT)
  find_package(Python 3.10 COMPONENTS Interpreter)
  if(Python_EXECUTABLE)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c "import torch; print(torch.utils.cmake_prefix_path)"
      OUTPUT_VARIABLE torch_prefix OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE result ERROR_QUIET)
    if(result EQUAL 0)
      list(APPEND CMAKE_PREFIX_PATH "${torch_prefix}")
    endif()
  endif()
endif()
# A CUDA build of torch asks for the whole CUDA toolkit, of which its targets use the runtime alone, and what
# is compiled here nothing. With the target torch::cudart there, it does not look. A project that this one
# is a part of may use CUDA itself, and decides.
if(PROJECT_IS_TOP_LEVEL AND NOT TARGET torch::cudart)
  add_library(torch::cudart INTERFACE IMPORTED)
endif()
# Torch's own warning about a library that Python-only users do not have (kineto) is not ours to act on.
set(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL ON)  # for the project that this one may be a part of
find_package(Torch 2.10 REQUIRED)
set(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL OFF)

get_filename_component(MAMBA_SSM_TORCH_ROOT "${TORCH_INSTALL_PREFIX}" REALPATH)
string(REGEX MATCH "^[0-9]+\\.[0-9]+" MAMBA_SSM_TORCH_VERSION "${Torch_VERSION}")

# Language standard of torch's C++ headers: C++20 from 2.13 on.
set(MAMBA_SSM_CXX_STANDARD 17)
if(Torch_VERSION VERSION_GREATER_EQUAL 2.13)
  set(MAMBA_SSM_CXX_STANDARD 20)
endif()
