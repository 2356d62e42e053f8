# Where things stand below the install prefix: <prefix>, or <site-packages>/mamba_ssm in a wheel.
set(MAMBA_SSM_LIB_DIR lib)
set(MAMBA_SSM_INCLUDE_DIR include)
set(MAMBA_SSM_CMAKE_DIR lib/cmake/mamba_ssm)
# In site-packages torch is a neighbour. Elsewhere the program itself brings its LibTorch along.
set(MAMBA_SSM_RPATH "$ORIGIN:$ORIGIN/../../torch/lib")
