# Installs libraries, headers and the CMake package find_package(mamba_ssm).
include(CMakePackageConfigHelpers)

# Two exports, since a program may want the ops where the modules do not fit its torch.
foreach(component ops nn)
  get_target_property(target mamba_ssm::${component} ALIASED_TARGET)
  install(TARGETS ${target} EXPORT mamba_ssm_${component}Targets
          LIBRARY DESTINATION ${MAMBA_SSM_LIB_DIR} INCLUDES DESTINATION ${MAMBA_SSM_INCLUDE_DIR})
  install(EXPORT mamba_ssm_${component}Targets NAMESPACE mamba_ssm:: DESTINATION ${MAMBA_SSM_CMAKE_DIR})
endforeach()
install(DIRECTORY ${PROJECT_SOURCE_DIR}/csrc/include/mamba_ssm DESTINATION ${MAMBA_SSM_INCLUDE_DIR}
        FILES_MATCHING PATTERN "*.h")
install(FILES ${PROJECT_BINARY_DIR}/include/mamba_ssm/version.h
        DESTINATION ${MAMBA_SSM_INCLUDE_DIR}/mamba_ssm)
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/mamba_ssmConfig.cmake.in
  ${PROJECT_BINARY_DIR}/mamba_ssmConfig.cmake INSTALL_DESTINATION ${MAMBA_SSM_CMAKE_DIR})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/mamba_ssmConfigVersion.cmake
  COMPATIBILITY SameMajorVersion)
install(FILES ${PROJECT_BINARY_DIR}/mamba_ssmConfig.cmake
              ${PROJECT_BINARY_DIR}/mamba_ssmConfigVersion.cmake DESTINATION ${MAMBA_SSM_CMAKE_DIR})
