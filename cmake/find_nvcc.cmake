# Looks for nvcc where CMake itself does not: CMake knows CUDACXX and PATH. Sets
#   CMAKE_CUDA_COMPILER      nvcc, if there is one
#   MAMBA_SSM_CUDA_PACKAGES  the folder of NVIDIA's Python packages that it is from, else empty
#   MAMBA_SSM_NVCC_PROBLEM   why the nvcc of that folder is of no use, else empty
set(MAMBA_SSM_CUDA_PACKAGES "" CACHE INTERNAL "")
set(MAMBA_SSM_NVCC_PROBLEM "")
find_program(CMAKE_CUDA_COMPILER nvcc PATHS ENV CUDA_HOME PATH_SUFFIXES bin NO_CACHE)
if(CMAKE_CUDA_COMPILER)
  return()
endif()

# The packages of CUDA 13 and later together have the shape of a toolkit. (nvidia-cuda-nvcc-cu12 has no nvcc.)
find_package(Python 3.10 COMPONENTS Interpreter QUIET)
if(Python_EXECUTABLE)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "import nvidia; print(*nvidia.__path__, sep=';')"
                  OUTPUT_VARIABLE folders OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
foreach(folder IN LISTS folders)
  file(GLOB compilers "${folder}/cu*/bin/nvcc")
  if(NOT compilers)
    continue()
  endif()
  list(SORT compilers COMPARE NATURAL ORDER DESCENDING)
  list(GET compilers 0 compiler)
  # Each part is a package of its own, and pip mixes their versions: a kernel shows whether they work together.
  set(probe "${CMAKE_CURRENT_BINARY_DIR}/nvcc_probe")
  file(WRITE "${probe}.cu" "#include <cuda_bf16.h>\n__global__ void probe(__nv_bfloat16* x) { *x = 1.f; }\n")
  execute_process(COMMAND "${compiler}" -c "${probe}.cu" -o "${probe}.o"
                  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  cmake_path(GET compiler PARENT_PATH folder)
  cmake_path(GET folder PARENT_PATH folder)
  if(result EQUAL 0 AND EXISTS "${folder}/lib/libcudart_static.a")
    set(CMAKE_CUDA_COMPILER "${compiler}")
    set(MAMBA_SSM_CUDA_PACKAGES "${folder}" CACHE INTERNAL "")
    return()
  endif()
  string(STRIP "${output}" output)
  set(MAMBA_SSM_NVCC_PROBLEM "${compiler} does not work, since its packages lack parts or are of several versions; \
`pip install \"cuda-toolkit[nvcc,cccl]==13.0.*\"`, with the version of torch's CUDA, installs all. ${output}")
endforeach()
find_program(CMAKE_CUDA_COMPILER nvcc PATHS /usr/local/cuda/bin NO_DEFAULT_PATH NO_CACHE)
