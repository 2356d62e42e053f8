/// @file
/// Everything public, in one header.
#pragma once

#include <mamba_ssm/generation.h>
#include <mamba_ssm/io/safetensors.h>
#include <mamba_ssm/nn/block.h>
#include <mamba_ssm/nn/mamba.h>
#include <mamba_ssm/nn/mamba2.h>
#include <mamba_ssm/nn/model.h>
#include <mamba_ssm/ops.h>
#include <mamba_ssm/version.h>

/// Mamba's operations, torch::nn modules, language model and files.
namespace mamba_ssm {}
