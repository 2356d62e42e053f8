// The language model: its parameters, files and decoding.
#include <ATen/Functions.h>
#include <mamba_ssm/io/safetensors.h>
#include <mamba_ssm/nn/model.h>
#include <torch/utils.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <map>
#include <set>
#include <vector>

#include "temporary_folder.h"
#include "values.h"

using at::Tensor;
using Catch::Matchers::ContainsSubstring;
using mamba_ssm::Block;
using mamba_ssm::Mamba;
using mamba_ssm::Mamba2Options;
using mamba_ssm::MambaLMConfig;
using mamba_ssm::MambaLMHeadModel;
using mamba_ssm::MambaLMHeadModelImpl;
using mamba_ssm::MambaOptions;

namespace {

MambaLMConfig small_config() {
  return MambaLMConfig().d_model(16).n_layer(2).vocab_size(59).ssm_cfg(MambaOptions(0).d_state(4));
}

MambaLMConfig small_mamba2_config() {
  return small_config().ssm_cfg(
      Mamba2Options(0).d_state(4).headdim(8).ngroups(2).d_ssm(16).bias(true));
}

Tensor random_tokens(int64_t batch, int64_t seqlen) {
  return at::randint(59, {batch, seqlen}, at::kLong);
}

std::set<std::string> names_of(const torch::nn::Module& module) {
  std::set<std::string> names;
  for (const auto& item : module.named_parameters()) names.insert(item.key());
  return names;
}

}  // namespace

TEST_CASE("parameters have the names of the Python model", "[model]") {
  MambaLMHeadModel model(small_config().n_layer(1));
  const std::set<std::string> tied = {"backbone.embedding.weight",
                                      "backbone.norm_f.weight",
                                      "backbone.layers.0.norm.weight",
                                      "backbone.layers.0.mixer.in_proj.weight",
                                      "backbone.layers.0.mixer.conv1d.weight",
                                      "backbone.layers.0.mixer.conv1d.bias",
                                      "backbone.layers.0.mixer.x_proj.weight",
                                      "backbone.layers.0.mixer.dt_proj.weight",
                                      "backbone.layers.0.mixer.dt_proj.bias",
                                      "backbone.layers.0.mixer.A_log",
                                      "backbone.layers.0.mixer.D",
                                      "backbone.layers.0.mixer.out_proj.weight"};
  CHECK(names_of(*model) == tied);
  CHECK(model->backbone->embedding->weight.sizes() == at::IntArrayRef({64, 16}));

  auto all = tied;
  all.insert({"lm_head.weight", "backbone.norm_f.bias", "backbone.layers.0.norm.bias"});
  CHECK(names_of(*MambaLMHeadModel(
            small_config().n_layer(1).tie_embeddings(false).rms_norm(false))) == all);
}

TEST_CASE("published sizes have the published numbers of parameters", "[model]") {
  // mamba-130m, without its layers but one.
  MambaLMHeadModel model(MambaLMConfig().d_model(768).n_layer(1));
  int64_t shared = 0, layer = 0;
  for (const auto& item : model->named_parameters()) {
    (item.key().rfind("backbone.layers.", 0) == 0 ? layer : shared) += item->numel();
  }
  CHECK(shared + 24 * layer == 129'135'360);
  // mamba2-130m, the same way.
  shared = layer = 0;
  MambaLMHeadModel model2(
      MambaLMConfig().d_model(768).n_layer(1).pad_vocab_size_multiple(16).ssm_cfg(
          Mamba2Options(0)));
  for (const auto& item : model2->named_parameters()) {
    (item.key().rfind("backbone.layers.", 0) == 0 ? layer : shared) += item->numel();
  }
  CHECK(shared + 24 * layer == 128'989'632);
}

TEST_CASE("the model computes embedding, blocks, norm and head", "[model]") {
  const torch::NoGradGuard no_grad;
  const bool rms_norm = GENERATE(true, false);
  const MambaLMConfig config = GENERATE(small_config(), small_mamba2_config());
  at::manual_seed(0);
  MambaLMHeadModel model(
      MambaLMConfig(config).rms_norm(rms_norm).dtype(at::kDouble).tie_embeddings(rms_norm));
  const Tensor tokens = random_tokens(2, 6);
  const Tensor logits = model->forward(tokens);
  CHECK(logits.sizes() == at::IntArrayRef({2, 6, 64}));

  auto parameters = model->named_parameters();
  const auto normed = [&](const Tensor& x, const std::string& name) {
    const Tensor centered = rms_norm ? x : x - x.mean(-1, true);
    const Tensor scaled = centered / (centered.square().mean(-1, true) + 1e-5).sqrt();
    const Tensor y = scaled * parameters[name + ".weight"];
    return rms_norm ? y : y + parameters[name + ".bias"];
  };
  Tensor x =
      parameters["backbone.embedding.weight"].index_select(0, tokens.flatten()).view({2, 6, 16});
  for (size_t i = 0; i < 2; ++i) {
    auto& block = model->backbone->layers->at<mamba_ssm::BlockImpl>(i);
    const Tensor y = normed(x, "backbone.layers." + std::to_string(i) + ".norm");
    x = x + std::visit([&](auto& mixer) { return mixer->forward(y); }, block.mixer);
  }
  const Tensor head = parameters[rms_norm ? "backbone.embedding.weight" : "lm_head.weight"];
  check_close(logits, at::matmul(normed(x, "backbone.norm_f"), head.t()), 1e-9, 1e-12);

  check_close(model->forward(tokens, nullptr, /*num_last_tokens=*/2), logits.narrow(1, 4, 2), 1e-9,
              1e-12);
  check_close(model->forward(tokens, nullptr, /*num_last_tokens=*/100), logits, 1e-9, 1e-12);
}

TEST_CASE("a block is a module of its own", "[model]") {
  const torch::NoGradGuard no_grad;
  at::manual_seed(0);
  const bool rms_norm = GENERATE(false, true);
  Block block(mamba_ssm::BlockOptions(Mamba2Options(16).d_state(4).headdim(8)).rms_norm(rms_norm));
  CHECK(names_of(*block).count("norm.bias") == (rms_norm ? 0 : 1));
  CHECK(names_of(*block).count("mixer.in_proj.weight") == 1);
  const Tensor x = at::randn({2, 6, 16}), y = at::randn({2, 6, 16});
  Tensor residual = y;
  const Tensor expected = block->forward(x, residual);
  check_close(residual, x + y);
  Tensor normed;
  check_close(block->norm->forward(x + y, normed),
              rms_norm ? (x + y) / ((x + y).square().mean(-1, true) + 1e-5).sqrt()
                       : at::layer_norm(x + y, {16}));

  // In pieces, copied, in another type.
  auto state = block->allocate_inference_cache(2);
  std::vector<Tensor> pieces;
  for (int64_t begin : {0, 4, 5}) {
    const auto piece = [&](const Tensor& t) {
      return t.slice(1, begin, begin == 0 ? 4 : begin + 1);
    };
    residual = piece(y);
    pieces.push_back(block->forward(piece(x), residual, &state));
  }
  check_close(at::cat(pieces, 1), expected);
  const auto copy = std::dynamic_pointer_cast<mamba_ssm::BlockImpl>(block->clone());
  block->to(at::kDouble);
  residual = y;
  CHECK(copy->forward(x, residual).equal(expected));
  residual = y.to(at::kDouble);
  check_close(block->forward(x.to(at::kDouble), residual).to(at::kFloat), expected);
}

TEST_CASE("a 16-bit model keeps its residual stream in float32", "[model]") {
  const torch::NoGradGuard no_grad;
  at::manual_seed(0);
  MambaLMHeadModel model(small_config().dtype(at::kBFloat16));
  auto& block = model->backbone->layers->at<mamba_ssm::BlockImpl>(0);
  Tensor residual;
  const Tensor hidden = block.forward(at::randn({1, 3, 16}, at::kBFloat16), residual);
  CHECK(hidden.scalar_type() == at::kBFloat16);
  CHECK(residual.scalar_type() == at::kFloat);
  CHECK(model->forward(random_tokens(1, 4)).scalar_type() == at::kBFloat16);

  MambaLMHeadModel narrow(small_config().dtype(at::kBFloat16).residual_in_fp32(false));
  narrow->backbone->layers->at<mamba_ssm::BlockImpl>(0).forward(
      at::randn({1, 3, 16}, at::kBFloat16), residual = Tensor());
  CHECK(residual.scalar_type() == at::kBFloat16);
}

TEST_CASE("prefill and steps give the logits of one pass", "[model]") {
  const torch::NoGradGuard no_grad;
  at::manual_seed(0);
  MambaLMHeadModel model(GENERATE(small_config(), small_mamba2_config()));
  const Tensor tokens = random_tokens(3, 10);
  const Tensor expected = model->forward(tokens);

  auto states = model->allocate_inference_cache(3);
  REQUIRE(states.size() == 2);
  std::vector<Tensor> logits = {model->forward(tokens.narrow(1, 0, 4), &states),
                                model->forward(tokens.narrow(1, 4, 3), &states)};
  for (int64_t t = 7; t < 10; ++t) {
    logits.push_back(model->forward(tokens.narrow(1, t, 1), &states, /*num_last_tokens=*/1));
  }
  check_close(at::cat(logits, 1), expected);

  states.pop_back();
  CHECK_THROWS_WITH(model->forward(tokens, &states), ContainsSubstring("one state per layer"));
  CHECK_THROWS_WITH(model->forward(tokens.flatten()), ContainsSubstring("(batch, seqlen)"));
}

TEST_CASE("the model trains", "[model]") {
  at::manual_seed(0);
  MambaLMHeadModel model(GENERATE(small_config(), small_mamba2_config()));
  const Tensor tokens = random_tokens(2, 8);
  at::cross_entropy_loss(model->forward(tokens).flatten(0, 1), tokens.flatten()).backward();
  for (const auto& item : model->named_parameters()) {
    CAPTURE(item.key());
    REQUIRE(item->grad().defined());
    CHECK(item->grad().abs().sum().item<double>() > 0);
  }
}

TEST_CASE("a cloned model is independent", "[model]") {
  const torch::NoGradGuard no_grad;
  MambaLMHeadModel model(GENERATE(small_config(), small_mamba2_config()));
  const auto copy = std::dynamic_pointer_cast<MambaLMHeadModelImpl>(model->clone());
  REQUIRE(copy != nullptr);
  const Tensor tokens = random_tokens(1, 4);
  const Tensor expected = model->forward(tokens);
  for (const auto& parameter : model->parameters()) parameter.zero_();
  CHECK(copy->forward(tokens).equal(expected));
}

TEST_CASE("a saved model loads again", "[model]") {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  const bool tied = GENERATE(true, false);
  const auto options = GENERATE(
      mamba_ssm::MixerOptions(MambaOptions(0).d_state(4).dt_rank(3).expand(1.5)),
      mamba_ssm::MixerOptions(Mamba2Options(0).d_state(4).headdim(8).dt_limit({0.01, 0.5})));
  MambaLMHeadModel model(
      small_config().tie_embeddings(tied).residual_in_fp32(false).ssm_cfg(options));
  model->save_pretrained(folder / "checkpoint");
  MambaLMHeadModel loaded = MambaLMHeadModelImpl::from_pretrained(folder / "checkpoint");
  const Tensor tokens = random_tokens(2, 5);
  CHECK(loaded->forward(tokens).equal(model->forward(tokens)));
  CHECK(loaded->config.to_json() == model->config.to_json());

  MambaLMHeadModel half =
      MambaLMHeadModelImpl::from_pretrained(folder / "checkpoint", at::kBFloat16);
  CHECK(half->backbone->embedding->weight.scalar_type() == at::kBFloat16);
  const auto& mixer = half->backbone->layers->at<mamba_ssm::BlockImpl>(0).mixer;
  const Tensor D = std::visit([](const auto& module) { return module->D; }, mixer);
  CHECK(D.scalar_type() == at::kFloat);
}

TEST_CASE("a tied matrix may have either name, or both if they agree", "[model]") {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  MambaLMHeadModel model(small_config());
  model->save_pretrained(folder.path());
  auto tensors = mamba_ssm::state_dict(*model);
  const Tensor tokens = random_tokens(1, 5);
  const Tensor expected = model->forward(tokens);
  const auto load = [&] {
    mamba_ssm::save_safetensors(folder / "model.safetensors", tensors);
    return MambaLMHeadModelImpl::from_pretrained(folder.path());
  };

  tensors["lm_head.weight"] = tensors.at("backbone.embedding.weight");
  CHECK(load()->forward(tokens).equal(expected));
  tensors.erase("backbone.embedding.weight");
  CHECK(load()->forward(tokens).equal(expected));
  for (const Tensor& other :
       {at::zeros({64, 16}), at::zeros({64, 17}), at::zeros({64}, at::kLong)}) {
    tensors["backbone.embedding.weight"] = other;
    CHECK_THROWS_WITH(load(), ContainsSubstring("differ, but config.json ties them"));
  }
}

TEST_CASE("a model loads from shards", "[model]") {
  const torch::NoGradGuard no_grad;
  const TemporaryFolder folder;
  MambaLMHeadModel model(small_config());
  model->save_pretrained(folder.path());
  const auto tensors = mamba_ssm::state_dict(*model);
  std::string index;
  for (const auto& [name, tensor] : tensors) {  // one shard for each
    mamba_ssm::save_safetensors(folder / (name + ".safetensors"), {{name, tensor}});
    index += (index.empty() ? "\"" : ", \"") + name + "\": \"" + name + ".safetensors\"";
  }
  write(folder / "model.safetensors.index.json", "{\"weight_map\": {" + index + "}}");
  std::filesystem::remove(folder / "model.safetensors");
  MambaLMHeadModel loaded = MambaLMHeadModelImpl::from_pretrained(folder.path());
  const Tensor tokens = random_tokens(2, 5);
  CHECK(loaded->forward(tokens).equal(model->forward(tokens)));
  // One file goes before shards.
  model->backbone->norm_f->weight.fill_(2);
  model->save_pretrained(folder.path());
  CHECK(MambaLMHeadModelImpl::from_pretrained(folder.path())
            ->backbone->norm_f->weight.equal(model->backbone->norm_f->weight));
}

TEST_CASE("a checkpoint that does not fit is refused by name", "[model]") {
  const TemporaryFolder folder;
  MambaLMHeadModel model(small_config());
  model->save_pretrained(folder.path());
  const auto tensors = mamba_ssm::state_dict(*model);
  const auto load = [&](const std::map<std::string, Tensor>& changed) {
    mamba_ssm::save_safetensors(folder / "model.safetensors", changed);
    return MambaLMHeadModelImpl::from_pretrained(folder.path());
  };
  auto changed = tensors;

  changed.erase("backbone.norm_f.weight");
  CHECK_THROWS_WITH(load(changed), ContainsSubstring("missing: \"backbone.norm_f.weight\""));
  changed = tensors;
  changed["backbone.extra"] = at::ones({1});
  CHECK_THROWS_WITH(load(changed), ContainsSubstring("unexpected: \"backbone.extra\""));
  changed = tensors;
  changed["backbone.layers.1.mixer.D"] = at::ones({31});
  CHECK_THROWS_WITH(load(changed), ContainsSubstring("mismatched: \"backbone.layers.1.mixer.D\""));

  std::filesystem::remove(folder / "model.safetensors");
  CHECK_THROWS_WITH(MambaLMHeadModelImpl::from_pretrained(folder.path()),
                    ContainsSubstring("no model.safetensors, and no index of shards of it") &&
                        !ContainsSubstring("pytorch_model.bin"));
  write(folder / "pytorch_model.bin", "");
  CHECK_THROWS_WITH(MambaLMHeadModelImpl::from_pretrained(folder.path()),
                    ContainsSubstring("make one of pytorch_model.bin, which is a pickle"));
  std::filesystem::remove(folder / "config.json");
  CHECK_THROWS_WITH(MambaLMHeadModelImpl::from_pretrained(folder.path()),
                    ContainsSubstring("config.json: no such file"));
}

TEST_CASE("config.json: defaults, all keys, and what is refused", "[model]") {
  const TemporaryFolder folder;
  const auto path = folder / "config.json";
  const auto parse = [&](const std::string& text) {
    write(path, text);
    return MambaLMConfig::from_file(path);
  };
  const auto with = [](const std::string& members) {
    return R"({"d_model": 8, "n_layer": 1, "vocab_size": 10)" +
           (members.empty() ? "}" : ", " + members + "}");
  };

  const MambaLMConfig defaults = parse(with(""));
  CHECK(defaults.d_model() == 8);
  CHECK((defaults.rms_norm() && defaults.residual_in_fp32() && defaults.tie_embeddings()));
  CHECK(defaults.padded_vocab_size() == 16);
  CHECK(std::get<MambaOptions>(defaults.ssm_cfg()).d_state() == 16);

  const MambaLMConfig config = parse(with(
      R"("d_intermediate": 0, "ssm_cfg": {"layer": "Mamba1", "d_state": 5, "expand": 3,
         "dt_rank": 7, "conv_bias": false, "use_fast_path": true}, "attn_layer_idx": [],
         "attn_cfg": {}, "rms_norm": false, "fused_add_norm": false,
         "pad_vocab_size_multiple": 4)"));
  const auto& options = std::get<MambaOptions>(config.ssm_cfg());
  CHECK(options.d_state() == 5);
  CHECK(options.expand() == 3);
  CHECK(options.dt_rank() == std::optional<int64_t>(7));
  CHECK_FALSE(options.conv_bias());
  CHECK_FALSE(config.rms_norm());
  CHECK(config.padded_vocab_size() == 12);
  CHECK_FALSE(
      std::get<MambaOptions>(parse(with(R"("ssm_cfg": {"dt_rank": "auto"})")).ssm_cfg()).dt_rank());
  CHECK(parse(config.to_json()).to_json() == config.to_json());

  const MambaLMConfig config2 = parse(with(
      R"("ssm_cfg": {"layer": "Mamba2", "d_state": 5, "headdim": 2, "d_ssm": 8, "ngroups": 2,
         "conv_init": 0.5, "A_init_range": [2, 3], "D_has_hdim": true, "rmsnorm": false,
         "norm_before_gate": true, "dt_limit": [0.5, null], "chunk_size": 64,
         "use_mem_eff_path": false})"));
  const auto& options2 = std::get<Mamba2Options>(config2.ssm_cfg());
  CHECK(options2.d_state() == 5);
  CHECK(options2.headdim() == 2);
  CHECK(options2.d_ssm() == std::optional<int64_t>(8));
  CHECK(options2.ngroups() == 2);
  CHECK(options2.conv_init() == std::optional<double>(0.5));
  CHECK(options2.A_init_range() == Mamba2Options::Range(2, 3));
  CHECK((options2.D_has_hdim() && options2.norm_before_gate() && !options2.rmsnorm()));
  CHECK(options2.dt_limit().first == 0.5);
  CHECK(std::isinf(options2.dt_limit().second));
  CHECK(parse(config2.to_json()).to_json() == config2.to_json());
  // As mamba_ssm 1.x wrote it, and nulls for what is empty.
  CHECK(parse(with(R"("ssm_cfg": {}, "rms_norm": true, "residual_in_fp32": true,
                      "fused_add_norm": true, "pad_vocab_size_multiple": 8)"))
            .to_json() == defaults.to_json());
  CHECK(parse(with(R"("ssm_cfg": null, "attn_layer_idx": null, "attn_cfg": null)")).to_json() ==
        defaults.to_json());
  const auto plain = parse(with(R"("ssm_cfg": {"layer": "Mamba2", "d_ssm": null})"));
  CHECK_FALSE(std::get<Mamba2Options>(plain.ssm_cfg()).d_ssm());

  const std::vector<std::pair<std::string, std::string>> refused = {
      {"", "not valid JSON"},
      {"{", "not valid JSON"},
      {"[]", "must be a JSON object"},
      {"{}", "d_model is missing"},
      {R"({"d_model": 8, "n_layer": 1})", "vocab_size is missing"},
      {R"({"d_model": "8", "n_layer": 1, "vocab_size": 10})", "d_model must be an integer"},
      {R"({"d_model": 8.0, "n_layer": 1, "vocab_size": 10})", "d_model must be an integer"},
      {R"({"d_model": 0, "n_layer": 1, "vocab_size": 10})", "d_model must be an integer from 1"},
      {R"({"d_model": 8, "n_layer": -1, "vocab_size": 10})", "n_layer must be an integer from 1"},
      {R"({"d_model": 8, "n_layer": 1, "vocab_size": 4294967296})", "vocab_size must be"},
      {R"({"d_model": 18446744073709551615, "n_layer": 1, "vocab_size": 1})", "d_model must be"},
      {with(R"("rms_norm": 1)"), "rms_norm must be true or false"},
      {with(R"("hidden_size": 1)"), "unknown key \"hidden_size\""},
      {with(R"("d_intermediate": 32)"), "MLP layers are not supported"},
      {with(R"("attn_layer_idx": [0])"), "attention layers are not supported"},
      {with(R"("ssm_cfg": 1)"), "ssm_cfg: must be a JSON object"},
      {with(R"("ssm_cfg": {"layer": "Mamba3"})"), "layer must be \"Mamba1\" or \"Mamba2\""},
      {with(R"("ssm_cfg": {"layer": "Mamba2", "dt_rank": 4})"), "unknown key \"dt_rank\""},
      {with(R"("ssm_cfg": {"layer": "Mamba2", "headdim": null})"), "headdim must be an integer"},
      {with(R"("ssm_cfg": {"layer": "Mamba2", "dt_limit": [null, 1]})"), "must be [low, high]"},
      {with(R"("ssm_cfg": {"layer": "Mamba2", "dt_limit": 1})"), "must be [low, high]"},
      {with(R"("ssm_cfg": {"headdim": 64})"), "ssm_cfg: unknown key \"headdim\""},
      {with(R"("ssm_cfg": {"dt_rank": "all"})"), "dt_rank must be an integer"},
      {with(R"("ssm_cfg": {"expand": "2"})"), "expand must be a number"},
      {std::string(2'000'000, ' '), "too large"},
  };
  for (const auto& [text, fault] : refused) {
    CAPTURE(text.substr(0, 100));
    CHECK_THROWS_WITH(parse(text), ContainsSubstring(fault) && ContainsSubstring(path.string()));
    CHECK_THROWS_AS(parse(text), std::runtime_error);
  }
}

TEST_CASE("a config far larger than its weights asks for no memory", "[model]") {
  const TemporaryFolder folder;
  MambaLMHeadModel model(small_config());
  model->save_pretrained(folder.path());
  for (const char* members :
       {R"("d_model": 2147483647, "n_layer": 1, "vocab_size": 1)",
        R"("d_model": 16, "n_layer": 2147483647, "vocab_size": 59)",
        R"("d_model": 16, "n_layer": 2, "vocab_size": 2147483647)",
        R"("d_model": 16, "n_layer": 2, "vocab_size": 59, "ssm_cfg": {"d_state": 2147483647})",
        R"("d_model": 16, "n_layer": 2, "vocab_size": 59, "ssm_cfg": {"d_conv": 2147483647})",
        R"("d_model": 16, "n_layer": 2, "vocab_size": 59, "ssm_cfg": {"dt_rank": 2147483647})",
        R"("d_model": 16, "n_layer": 2, "vocab_size": 59, "ssm_cfg": {"expand": 1e30})",
        R"("d_model": 16, "n_layer": 2, "vocab_size": 59,
           "ssm_cfg": {"layer": "Mamba2", "d_state": 2147483647})",
        R"("d_model": 16, "n_layer": 2, "vocab_size": 59,
           "ssm_cfg": {"layer": "Mamba2", "expand": 1e30})"}) {
    write(folder / "config.json", std::string("{") + members + "}");
    CHECK_THROWS_WITH(MambaLMHeadModelImpl::from_pretrained(folder.path()),
                      ContainsSubstring("describes a model of"));
  }
}
