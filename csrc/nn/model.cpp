#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <mamba_ssm/io/safetensors.h>
#include <mamba_ssm/nn/model.h>
#include <mamba_ssm/ops.h>
#include <torch/nn/init.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "parts.h"

namespace mamba_ssm {
namespace {

using at::Tensor;
using Json = nlohmann::ordered_json;

constexpr char kConfigFile[] = "config.json";
constexpr char kWeightsFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr char kPickleFile[] = "pytorch_model.bin";
constexpr char kEmbeddingKey[] = "backbone.embedding.weight";
constexpr char kHeadKey[] = "lm_head.weight";

/// Faults of files: an exception whose text is for the user, without a stack trace.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw std::runtime_error(c10::str(parts...));
}

/// The members of a JSON object, taken one by one; what is left at the end is unknown.
class Members {
 public:
  Members(const Json& object, std::string where) : rest_(object), where_(std::move(where)) {
    require(object.is_object(), where_, ": must be a JSON object");
  }

  std::optional<Json> take(const char* key) {
    const auto member = rest_.find(key);
    if (member == rest_.end()) return std::nullopt;
    Json value = std::move(*member);
    rest_.erase(member);
    return value;
  }

  /// Null counts as absent.
  std::optional<Json> take_unless_null(const char* key) {
    auto value = take(key);
    if (value && value->is_null()) value.reset();
    return value;
  }

  /// Counts and sizes: no product of two of them leaves int64.
  void read(const char* key, int64_t& value) {
    const auto json = take(key);
    if (!json) return;
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
    const bool in_range = json->is_number_integer() && *json >= 1 && *json <= kMax;
    require(in_range, where_, ": ", key, " must be an integer from 1 to ", kMax, ", got ",
            describe(*json));
    value = json->get<int64_t>();
  }

  void read(const char* key, double& value) {
    if (const auto json = take(key)) {
      require(json->is_number(), where_, ": ", key, " must be a number, got ", describe(*json));
      value = json->get<double>();
    }
  }

  void read(const char* key, bool& value) {
    if (const auto json = take(key)) {
      require(json->is_boolean(), where_, ": ", key, " must be true or false, got ",
              describe(*json));
      value = json->get<bool>();
    }
  }

  void read(const char* key, std::string& value) {
    if (const auto json = take(key)) {
      require(json->is_string(), where_, ": ", key, " must be a string, got ", describe(*json));
      value = json->get<std::string>();
    }
  }

  void read(const char* key, std::optional<int64_t>& value) { read_unless_null(key, value); }

  void read(const char* key, std::optional<double>& value) { read_unless_null(key, value); }

  /// [low, high]; JSON knows no infinity, so null stands for none.
  void read(const char* key, Mamba2Options::Range& value) {
    if (const auto json = take(key)) {
      require(json->is_array() && json->size() == 2 && json->front().is_number() &&
                  (json->back().is_number() || json->back().is_null()),
              where_, ": ", key, " must be [low, high], or [low, null] without an upper end");
      value.first = json->front().get<double>();
      value.second = json->back().is_null() ? std::numeric_limits<double>::infinity()
                                            : json->back().get<double>();
    }
  }

  void expect(const char* key) const {
    require(rest_.contains(key), where_, ": ", key, " is missing");
  }

  void finish() const {
    if (rest_.empty()) return;
    require(false, where_, ": unknown key ", describe(rest_.begin().key()));
  }

  /// A value for an error message: short, and plain ASCII whatever the file holds.
  static std::string describe(const Json& json) {
    std::string text = json.is_structured() ? json.type_name()
                                            : json.dump(-1, ' ', /*ensure_ascii=*/true,
                                                        Json::error_handler_t::replace);
    constexpr size_t kMaxLength = 80;
    return text.size() <= kMaxLength ? text : text.substr(0, kMaxLength) + "...";
  }

 private:
  template <class Number>
  void read_unless_null(const char* key, std::optional<Number>& value) {
    const auto member = rest_.find(key);
    if (member == rest_.end()) return;
    if (member->is_null()) {
      take(key);
    } else {
      read(key, value.emplace());
    }
  }

  Json rest_;
  std::string where_;
};

MambaOptions read_mamba_options(Members& members, const std::string& where) {
  MambaOptions options(0);
  members.read("d_state", options.d_state());
  members.read("d_conv", options.d_conv());
  members.read("expand", options.expand());
  if (const auto dt_rank = members.take("dt_rank"); dt_rank && *dt_rank != "auto") {
    Members rank(Json{{"dt_rank", *dt_rank}}, where);
    rank.read("dt_rank", options.dt_rank().emplace());
  }
  members.read("dt_min", options.dt_min());
  members.read("dt_max", options.dt_max());
  members.read("dt_init", options.dt_init());
  members.read("dt_scale", options.dt_scale());
  members.read("dt_init_floor", options.dt_init_floor());
  members.read("conv_bias", options.conv_bias());
  members.read("bias", options.bias());
  bool use_fast_path;  // a choice between two ways to the same result
  members.read("use_fast_path", use_fast_path);
  return options;
}

Mamba2Options read_mamba2_options(Members& members) {
  Mamba2Options options(0);
  members.read("d_state", options.d_state());
  members.read("d_conv", options.d_conv());
  members.read("conv_init", options.conv_init());
  members.read("expand", options.expand());
  members.read("headdim", options.headdim());
  members.read("d_ssm", options.d_ssm());
  members.read("ngroups", options.ngroups());
  members.read("A_init_range", options.A_init_range());
  members.read("D_has_hdim", options.D_has_hdim());
  members.read("rmsnorm", options.rmsnorm());
  members.read("norm_before_gate", options.norm_before_gate());
  members.read("dt_min", options.dt_min());
  members.read("dt_max", options.dt_max());
  members.read("dt_init_floor", options.dt_init_floor());
  members.read("dt_limit", options.dt_limit());
  members.read("bias", options.bias());
  members.read("conv_bias", options.conv_bias());
  int64_t chunk_size;  // these two do not change the result
  members.read("chunk_size", chunk_size);
  bool use_mem_eff_path;
  members.read("use_mem_eff_path", use_mem_eff_path);
  return options;
}

MixerOptions read_ssm_cfg(const Json& json, const std::string& where) {
  Members members(json, where);
  std::string layer = "Mamba1";
  members.read("layer", layer);
  require(layer == "Mamba1" || layer == "Mamba2", where,
          ": layer must be \"Mamba1\" or \"Mamba2\", got ", Members::describe(layer));
  MixerOptions options = MambaOptions(0);
  if (layer == "Mamba1") {
    options = read_mamba_options(members, where);
  } else {
    options = read_mamba2_options(members);
  }
  members.finish();
  return options;
}

Json ssm_cfg_of(const MambaOptions& options) {
  Json json{{"layer", "Mamba1"},
            {"d_state", options.d_state()},
            {"d_conv", options.d_conv()},
            {"expand", options.expand()},
            {"dt_rank", "auto"},
            {"dt_min", options.dt_min()},
            {"dt_max", options.dt_max()},
            {"dt_init", options.dt_init()},
            {"dt_scale", options.dt_scale()},
            {"dt_init_floor", options.dt_init_floor()},
            {"conv_bias", options.conv_bias()},
            {"bias", options.bias()}};
  if (options.dt_rank()) json["dt_rank"] = *options.dt_rank();
  return json;
}

Json ssm_cfg_of(const Mamba2Options& options) {
  const auto range = [](const Mamba2Options::Range& r) {
    return Json::array({r.first, std::isinf(r.second) ? Json() : Json(r.second)});
  };
  return {{"layer", "Mamba2"},
          {"d_state", options.d_state()},
          {"d_conv", options.d_conv()},
          {"conv_init", options.conv_init() ? Json(*options.conv_init()) : Json()},
          {"expand", options.expand()},
          {"headdim", options.headdim()},
          {"d_ssm", options.d_ssm() ? Json(*options.d_ssm()) : Json()},
          {"ngroups", options.ngroups()},
          {"A_init_range", range(options.A_init_range())},
          {"D_has_hdim", options.D_has_hdim()},
          {"rmsnorm", options.rmsnorm()},
          {"norm_before_gate", options.norm_before_gate()},
          {"dt_min", options.dt_min()},
          {"dt_max", options.dt_max()},
          {"dt_init_floor", options.dt_init_floor()},
          {"dt_limit", range(options.dt_limit())},
          {"bias", options.bias()},
          {"conv_bias", options.conv_bias()}};
}

std::string read_text(const std::filesystem::path& path) {
  constexpr std::uintmax_t kMaxSize = 1 << 20;
  require(std::filesystem::is_regular_file(path), path.string(), ": no such file");
  require(std::filesystem::file_size(path) <= kMaxSize, path.string(),
          ": too large for a configuration");
  std::ifstream file(path, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  require(file.good(), path.string(), ": cannot be read");
  return text;
}

/// The weights in a folder: one file, or what its index lists.
std::map<std::string, Tensor> load_weights(const std::filesystem::path& folder) {
  if (std::filesystem::exists(folder / kWeightsFile))
    return load_safetensors(folder / kWeightsFile);
  if (std::filesystem::exists(folder / kIndexFile))
    return load_safetensors_shards(folder / kIndexFile);
  const bool has_pickle = std::filesystem::exists(folder / kPickleFile);
  require(false, folder.string(), ": no ", kWeightsFile, ", and no index of shards of it",
          has_pickle ? "; Python's from_pretrained(use_safetensors=False) and save_pretrained make "
                       "one of pytorch_model.bin, which is a pickle"
                     : "");
  return {};
}

/// Parameters of a mixer, at least; doubles, so that nothing overflows.
double count_parameters(const MambaOptions& options, double d_model) {
  const double d_inner = std::floor(options.expand() * d_model);
  const double d_state = static_cast<double>(options.d_state());
  const double dt_rank =
      options.dt_rank() ? static_cast<double>(*options.dt_rank()) : std::ceil(d_model / 16);
  return d_inner *
         (3 * d_model + static_cast<double>(options.d_conv()) + 2 * dt_rank + 3 * d_state + 2);
}

double count_parameters(const Mamba2Options& options, double d_model) {
  const double d_inner = std::floor(options.expand() * d_model);
  const double d_ssm = options.d_ssm() ? static_cast<double>(*options.d_ssm()) : d_inner;
  const double nheads = std::floor(d_ssm / static_cast<double>(options.headdim()));
  const double channels =
      d_ssm + 2 * static_cast<double>(options.ngroups()) * static_cast<double>(options.d_state());
  return d_model * (3 * d_inner - d_ssm + channels + nheads) +
         channels * static_cast<double>(options.d_conv()) + 3 * nheads;
}

/// Of the model that a config describes.
double count_parameters(const MambaLMConfig& config) {
  const double d_model = static_cast<double>(config.d_model());
  const double mixer = std::visit(
      [&](const auto& options) { return count_parameters(options, d_model); }, config.ssm_cfg());
  const double embedding = static_cast<double>(config.padded_vocab_size()) * d_model;
  return static_cast<double>(config.n_layer()) * (mixer + d_model) + embedding;
}

template <class Module>
Module placed(Module module, const MambaLMConfig& config) {
  if (config.dtype()) module->to(*config.dtype());
  if (config.device()) module->to(*config.device());
  return module;
}

BlockOptions block_options(const MambaLMConfig& config) {
  MixerOptions mixer = config.ssm_cfg();
  const auto complete = [&](auto& options) {
    options.d_model(config.d_model()).dtype(config.dtype()).device(config.device());
  };
  std::visit(complete, mixer);
  return BlockOptions(std::move(mixer))
      .rms_norm(config.rms_norm())
      .norm_epsilon(config.norm_epsilon())
      .residual_in_fp32(config.residual_in_fp32());
}

}  // namespace

MambaLMConfig MambaLMConfig::from_file(const std::filesystem::path& path) {
  const Json json = Json::parse(read_text(path), /*cb=*/nullptr, /*allow_exceptions=*/false);
  require(!json.is_discarded(), path.string(), ": not valid JSON");

  MambaLMConfig config;
  Members members(json, path.string());
  for (const char* key : {"d_model", "n_layer", "vocab_size"}) members.expect(key);
  members.read("d_model", config.d_model());
  members.read("n_layer", config.n_layer());
  members.read("vocab_size", config.vocab_size());
  members.read("pad_vocab_size_multiple", config.pad_vocab_size_multiple());
  members.read("rms_norm", config.rms_norm());
  members.read("residual_in_fp32", config.residual_in_fp32());
  members.read("fused_add_norm", config.fused_add_norm());
  members.read("tie_embeddings", config.tie_embeddings());
  if (const auto ssm_cfg = members.take_unless_null("ssm_cfg")) {
    config.ssm_cfg() = read_ssm_cfg(*ssm_cfg, path.string() + ": ssm_cfg");
  }
  if (const auto d_intermediate = members.take("d_intermediate")) {
    require(*d_intermediate == 0, path.string(),
            ": d_intermediate must be 0 (MLP layers are not supported), got ",
            Members::describe(*d_intermediate));
  }
  if (const auto attn_layers = members.take_unless_null("attn_layer_idx")) {
    require(attn_layers->is_array() && attn_layers->empty(), path.string(),
            ": attn_layer_idx must be [] (attention layers are not supported)");
  }
  members.take("attn_cfg");  // of no layer
  members.finish();
  return config;
}

std::string MambaLMConfig::to_json() const {
  Json ssm = std::visit([](const auto& options) { return ssm_cfg_of(options); }, ssm_cfg());
  const Json json{{"d_model", d_model()},
                  {"d_intermediate", 0},
                  {"n_layer", n_layer()},
                  {"vocab_size", vocab_size()},
                  {"ssm_cfg", std::move(ssm)},
                  {"attn_layer_idx", Json::array()},
                  {"attn_cfg", Json::object()},
                  {"rms_norm", rms_norm()},
                  {"residual_in_fp32", residual_in_fp32()},
                  {"fused_add_norm", fused_add_norm()},
                  {"pad_vocab_size_multiple", pad_vocab_size_multiple()},
                  {"tie_embeddings", tie_embeddings()}};
  return json.dump(2) + "\n";
}

int64_t MambaLMConfig::padded_vocab_size() const {
  const int64_t multiple = pad_vocab_size_multiple();
  return (vocab_size() + multiple - 1) / multiple * multiple;
}

MixerModelImpl::MixerModelImpl(MambaLMConfig config_) : config(std::move(config_)) {
  TORCH_CHECK(config.d_model() > 0 && config.n_layer() > 0 && config.vocab_size() > 0 &&
                  config.pad_vocab_size_multiple() > 0,
              "MambaLMHeadModel: d_model, n_layer, vocab_size and pad_vocab_size_multiple must be "
              "positive, got ",
              config.d_model(), ", ", config.n_layer(), ", ", config.vocab_size(), " and ",
              config.pad_vocab_size_multiple());
  reset();
}

void MixerModelImpl::reset() {
  const torch::NoGradGuard no_grad;
  const bool fills = !WithoutFills::active();
  const int64_t vocab = config.padded_vocab_size(), d_model = config.d_model();
  torch::nn::EmbeddingOptions options(vocab, d_model);
  if (!fills) options._weight(at::empty({vocab, d_model}));
  embedding = torch::nn::Embedding(options);
  embedding->options._weight(Tensor());  // the options would keep it when the module moves
  if (fills) embedding->weight.normal_(0, 0.02);
  embedding = register_module("embedding", placed(embedding, config));

  layers = register_module("layers", torch::nn::ModuleList());
  for (int64_t i = 0; i < config.n_layer(); ++i) {
    Block block(block_options(config));
    // The variance of the residual stream shall not grow with the depth.
    const auto initialize = [&](auto& mixer) {
      torch::nn::init::kaiming_uniform_(mixer->out_proj->weight, std::sqrt(5.0));
      mixer->out_proj->weight /= std::sqrt(static_cast<double>(config.n_layer()));
      if (mixer->options.bias()) {
        mixer->in_proj->bias.zero_();
        mixer->out_proj->bias.zero_();
      }
    };
    if (fills) std::visit(initialize, block->mixer);
    layers->push_back(block);
  }
  norm_f = register_module(
      "norm_f", placed(Norm(config.d_model(), config.rms_norm(), config.norm_epsilon()), config));
}

Tensor MixerModelImpl::forward(const Tensor& input_ids, std::vector<MambaState>* states,
                               const std::optional<Tensor>& seq_idx) {
  TORCH_CHECK(input_ids.dim() == 2,
              "MambaLMHeadModel: input_ids must have shape (batch, seqlen), got ",
              input_ids.sizes());
  TORCH_CHECK(states == nullptr || states->size() == layers->size(),
              "MambaLMHeadModel: expected one state per layer, ", layers->size(), ", got ",
              states == nullptr ? 0 : states->size());
  Tensor hidden = look_up(embedding, input_ids);  // (batch, seqlen, d_model)
  Tensor residual;
  for (size_t i = 0; i < layers->size(); ++i) {
    hidden = layers->at<BlockImpl>(i).forward(hidden, residual,
                                              states == nullptr ? nullptr : &(*states)[i], seq_idx);
  }
  return norm_f->forward(hidden, residual, config.residual_in_fp32());
}

MambaLMHeadModelImpl::MambaLMHeadModelImpl(MambaLMConfig config_) : config(std::move(config_)) {
  reset();
}

void MambaLMHeadModelImpl::reset() {
  backbone = register_module("backbone", MixerModel(config));
  if (config.tie_embeddings()) return;
  lm_head = register_module(
      "lm_head",
      placed(make_linear(config.d_model(), config.padded_vocab_size(), /*bias=*/false), config));
}

Tensor MambaLMHeadModelImpl::forward(const Tensor& input_ids, std::vector<MambaState>* states,
                                     int64_t num_last_tokens,
                                     const std::optional<Tensor>& seq_idx) {
  TORCH_CHECK(num_last_tokens >= 0, "MambaLMHeadModel: num_last_tokens must not be negative, got ",
              num_last_tokens);
  Tensor hidden = backbone->forward(input_ids, states, seq_idx);
  const int64_t seqlen = hidden.size(1);
  if (num_last_tokens > 0 && num_last_tokens < seqlen) {
    hidden = hidden.narrow(1, seqlen - num_last_tokens, num_last_tokens);
  }
  return step_linear(hidden, lm_head ? lm_head->weight : backbone->embedding->weight);
}

std::vector<MambaState> MambaLMHeadModelImpl::allocate_inference_cache(
    int64_t batch_size, int64_t max_seqlen, std::optional<at::ScalarType> dtype,
    std::optional<at::ScalarType> state_dtype) const {
  std::vector<MambaState> states;
  for (size_t i = 0; i < backbone->layers->size(); ++i) {
    const auto& block = backbone->layers->at<BlockImpl>(i);
    states.push_back(block.allocate_inference_cache(batch_size, max_seqlen, dtype, state_dtype));
  }
  return states;
}

std::shared_ptr<MambaLMHeadModelImpl> MambaLMHeadModelImpl::from_pretrained(
    const std::filesystem::path& folder, std::optional<at::ScalarType> dtype,
    std::optional<at::Device> device) {
  const auto config = MambaLMConfig::from_file(folder / kConfigFile).dtype(dtype).device(device);
  auto tensors = load_weights(folder);

  // A config that describes far more than the file holds is refused before memory is asked for;
  // smaller differences are named below, key by key.
  double held = 0;
  for (const auto& [name, tensor] : tensors) held += static_cast<double>(tensor.numel());
  const double described = count_parameters(config);
  require(described <= 2 * held, folder.string(), ": ", kConfigFile,
          " describes a model of at least ", described, " parameters, the weights hold ", held);

  if (config.tie_embeddings()) {
    // A writer may have kept either of the two names of the tied matrix, or both.
    if (auto head = tensors.extract(kHeadKey)) {
      const Tensor head_weight = head.mapped();
      const Tensor& embedding = tensors.try_emplace(kEmbeddingKey, head_weight).first->second;
      const bool agree =
          embedding.scalar_type() == head_weight.scalar_type() && at::equal(embedding, head_weight);
      require(agree, folder.string(), ": ", kHeadKey, " and ", kEmbeddingKey,
              " differ, but config.json ties them");
    }
  }
  const auto make_model = [&] {
    const WithoutFills without_fills;
    return std::make_shared<MambaLMHeadModelImpl>(config);
  };
  const auto model = make_model();
  load_state_dict(*model, tensors);
  load_kernels(model->backbone->embedding->weight);
  return model;
}

void MambaLMHeadModelImpl::save_pretrained(const std::filesystem::path& folder) const {
  std::filesystem::create_directories(folder);
  std::ofstream file(folder / kConfigFile, std::ios::binary | std::ios::trunc);
  file << config.to_json() << std::flush;
  require(file.good(), (folder / kConfigFile).string(), ": cannot be written");
  save_safetensors(folder / kWeightsFile, state_dict(*this), {{"format", "pt"}});
}

}  // namespace mamba_ssm
