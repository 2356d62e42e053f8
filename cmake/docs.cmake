# The target `docs`: the reference of csrc/include, made by Doxygen into docs/html of the build tree.
# A warning is an error: what is public is documented.
find_package(Doxygen 1.9 QUIET)
if(NOT DOXYGEN_FOUND)
  return()
endif()
set(DOXYGEN_PROJECT_NAME mamba_ssm)
set(DOXYGEN_PROJECT_BRIEF "Mamba's operations and modules for LibTorch")
set(DOXYGEN_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/docs)
set(DOXYGEN_STRIP_FROM_INC_PATH ${PROJECT_SOURCE_DIR}/csrc/include ${PROJECT_BINARY_DIR}/include)
set(DOXYGEN_STRIP_FROM_PATH ${PROJECT_SOURCE_DIR}/csrc/include ${PROJECT_BINARY_DIR}/include)
set(DOXYGEN_JAVADOC_AUTOBRIEF YES)
set(DOXYGEN_MARKDOWN_SUPPORT YES)
set(DOXYGEN_QUIET YES)
set(DOXYGEN_WARN_AS_ERROR FAIL_ON_WARNINGS)
set(DOXYGEN_WARN_NO_PARAMDOC NO)
set(DOXYGEN_HAVE_DOT NO)
# torch's macros, as far as a reader of the reference cares: an option is a number with a default,
# TORCH_MODULE makes the handle of an Impl.
set(DOXYGEN_MACRO_EXPANSION YES)
set(DOXYGEN_EXPAND_ONLY_PREDEF YES)
set(DOXYGEN_SEARCH_INCLUDES NO)
set(DOXYGEN_PREDEFINED
  "MAMBA_SSM_API=" "TORCH_ARG(type,name)=type name" "FORWARD_HAS_DEFAULT_ARGS(...)="
  "TORCH_MODULE(name)=class name : public torch::nn::ModuleHolder<name##Impl> {}")
doxygen_add_docs(docs ${PROJECT_SOURCE_DIR}/csrc/include ${PROJECT_BINARY_DIR}/include)
