/// @file
/// Weights in files: the safetensors format, read and written without running any code of the file.
///
/// Format: 8 bytes, the length n of the header (little endian); n bytes of JSON, which maps each
/// tensor name to dtype, shape and [begin, end) of its bytes; the tensors' bytes, without gaps.
#pragma once

#include <ATen/core/Tensor.h>
#include <mamba_ssm/export.h>
#include <torch/nn/module.h>

#include <filesystem>
#include <map>
#include <string>

namespace mamba_ssm {

/// The tensors of a file, by name, on the CPU.
///
/// The file is mapped, not read: a tensor occupies memory as its pages are touched, and writing
/// into it changes neither the file nor another mapping of it. (A tensor whose bytes are not
/// aligned for its dtype, and a boolean one, is copied.) The mapping lives as long as any of the
/// tensors. Files must be replaced by renaming a new one over them, as save_safetensors does;
/// overwriting or truncating a file that is in use is undefined, as for every mapped file.
///
/// `metadata`, if given, receives the file's free-form strings.
///
/// Raises std::runtime_error if `path` cannot be read, is not a regular file (or a link to one), or
/// is malformed. The text names the file and one of these faults, and says what is wrong:
/// HeaderTooSmall, HeaderTooLarge, InvalidHeaderLength, InvalidHeaderStart,
/// InvalidHeaderDeserialization, TensorInvalidInfo, InvalidOffset, ValidationOverflow,
/// MetadataIncompleteBuffer, IoError.
MAMBA_SSM_API std::map<std::string, at::Tensor> load_safetensors(
    const std::filesystem::path& path, std::map<std::string, std::string>* metadata = nullptr);

/// The tensors of a checkpoint in several files, the shards, which `index` lists
/// (model.safetensors.index.json): a JSON object whose member weight_map maps each tensor name to
/// the name of a file beside the index. Tensors as from load_safetensors.
///
/// Raises std::runtime_error as load_safetensors does for a shard, and with one of these faults:
/// InvalidIndex for an index of more than 100 MB, that is not such an object, has a key twice, or
/// names a file that is not in its folder; MissingShard; ShardMismatch if a shard does not hold
/// exactly the tensors that are listed for it.
MAMBA_SSM_API std::map<std::string, at::Tensor> load_safetensors_shards(
    const std::filesystem::path& index);

/// Writes tensors of any device and strides. The file appears under its name only when it is
/// complete; equal arguments give equal bytes; every tensor is aligned for its dtype.
///
/// Raises std::runtime_error if a tensor has no dense memory or a dtype that the format lacks, if a
/// name is not valid UTF-8, or if writing fails; a file already at `path` is then untouched.
MAMBA_SSM_API void save_safetensors(const std::filesystem::path& path,
                                    const std::map<std::string, at::Tensor>& tensors,
                                    const std::map<std::string, std::string>& metadata = {});

/// Parameters and buffers of a module and its children, by name: not copies, and without history.
MAMBA_SSM_API std::map<std::string, at::Tensor> state_dict(const torch::nn::Module& module);

/// Copies tensors into the parameters and buffers of a module that have their names, converting
/// between floating dtypes and devices.
///
/// Raises std::runtime_error that lists every missing, unexpected and mismatched (in shape, or
/// floating where the other is not) name; the module is then unchanged.
MAMBA_SSM_API void load_state_dict(torch::nn::Module& module,
                                   const std::map<std::string, at::Tensor>& tensors);

}  // namespace mamba_ssm
