// mamba_ssm._C: the C++ modules as Python objects. The package imports it only to read and write
// safetensors where the package of that name is not installed.
#include <mamba_ssm/mamba_ssm.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <variant>

namespace py = pybind11;

namespace {

using namespace pybind11::literals;
using at::Tensor;
using mamba_ssm::GenerateOptions;
using mamba_ssm::Mamba2Impl;
using mamba_ssm::Mamba2Options;
using mamba_ssm::MambaImpl;
using mamba_ssm::MambaLMHeadModelImpl;
using mamba_ssm::MambaState;
using Dtype = std::optional<at::ScalarType>;
using Device = std::optional<at::Device>;
using Path = std::filesystem::path;
using OptionalInt = std::optional<int64_t>;
using Tensors = std::map<std::string, Tensor>;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <typename Module>
py::dict named_parameters(const Module& module) {
  py::dict parameters;
  for (const auto& item : module.named_parameters()) parameters[py::str(item.key())] = item.value();
  return parameters;
}

template <typename Module>
void load(Module& module, const std::variant<Tensors, Path>& source) {
  const auto* path = std::get_if<Path>(&source);
  mamba_ssm::load_state_dict(
      module, path != nullptr ? mamba_ssm::load_safetensors(*path) : std::get<Tensors>(source));
}

std::shared_ptr<MambaImpl> make_mamba(int64_t d_model, int64_t d_state, int64_t d_conv,
                                      double expand, const std::variant<int64_t, std::string>& rank,
                                      double dt_min, double dt_max, const std::string& dt_init,
                                      double dt_scale, double dt_init_floor, bool conv_bias,
                                      bool bias, Device device, Dtype dtype) {
  auto options = mamba_ssm::MambaOptions(d_model)
                     .d_state(d_state)
                     .d_conv(d_conv)
                     .expand(expand)
                     .dt_min(dt_min)
                     .dt_max(dt_max)
                     .dt_init(dt_init)
                     .dt_scale(dt_scale)
                     .dt_init_floor(dt_init_floor)
                     .conv_bias(conv_bias)
                     .bias(bias)
                     .device(device)
                     .dtype(dtype);
  if (const auto* number = std::get_if<int64_t>(&rank)) {
    options.dt_rank(*number);
  } else if (std::get<std::string>(rank) != "auto") {
    throw py::value_error("Mamba: dt_rank must be an int or \"auto\"");
  }
  return std::make_shared<MambaImpl>(std::move(options));
}

std::shared_ptr<Mamba2Impl> make_mamba2(int64_t d_model, int64_t d_state, int64_t d_conv,
                                        std::optional<double> conv_init, double expand,
                                        int64_t headdim, std::optional<int64_t> d_ssm,
                                        int64_t ngroups, Mamba2Options::Range A_init_range,
                                        bool D_has_hdim, bool rmsnorm, bool norm_before_gate,
                                        double dt_min, double dt_max, double dt_init_floor,
                                        Mamba2Options::Range dt_limit, bool bias, bool conv_bias,
                                        Device device, Dtype dtype) {
  auto options = Mamba2Options(d_model).d_state(d_state).d_conv(d_conv).conv_init(conv_init);
  options.expand(expand).headdim(headdim).d_ssm(d_ssm).ngroups(ngroups).A_init_range(A_init_range);
  options.D_has_hdim(D_has_hdim).rmsnorm(rmsnorm).norm_before_gate(norm_before_gate);
  options.dt_min(dt_min).dt_max(dt_max).dt_init_floor(dt_init_floor).dt_limit(dt_limit);
  options.bias(bias).conv_bias(conv_bias).device(device).dtype(dtype);
  return std::make_shared<Mamba2Impl>(std::move(options));
}

/// What every module has besides its constructor and forward.
template <typename Module>
auto define_module(py::module_& m, const char* name) {
  return py::class_<Module, std::shared_ptr<Module>>(m, name)
      .def("load", &load<Module>, "source"_a, "From a safetensors file or a dict of tensors.",
           NoGil())
      .def("named_parameters", &named_parameters<Module>)
      .def("allocate_inference_cache", &Module::allocate_inference_cache, "batch_size"_a,
           "max_seqlen"_a = 0, "dtype"_a = py::none(), "state_dtype"_a = py::none(), NoGil());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "LibTorch modules of mamba_ssm.";

  m.def(
      "load_safetensors", [](const Path& path) { return mamba_ssm::load_safetensors(path); },
      "path"_a, NoGil());
  m.def("save_safetensors", &mamba_ssm::save_safetensors, "path"_a, "tensors"_a,
        "metadata"_a = std::map<std::string, std::string>(), NoGil());

  py::class_<MambaState>(m, "MambaState")
      .def(py::init<Tensor, Tensor>(), "conv_state"_a, "ssm_state"_a)
      .def_readwrite("conv_state", &MambaState::conv_state)
      .def_readwrite("ssm_state", &MambaState::ssm_state);

  auto mamba = define_module<MambaImpl>(m, "Mamba");
  mamba.def(py::init(&make_mamba), "d_model"_a, "d_state"_a = 16, "d_conv"_a = 4, "expand"_a = 2.0,
            "dt_rank"_a = "auto", "dt_min"_a = 0.001, "dt_max"_a = 0.1, "dt_init"_a = "random",
            "dt_scale"_a = 1.0, "dt_init_floor"_a = 1e-4, "conv_bias"_a = true, "bias"_a = false,
            "device"_a = py::none(), "dtype"_a = py::none());
  mamba.def("forward", &MambaImpl::forward, "hidden_states"_a, "state"_a = py::none(),
            "seq_idx"_a = py::none(), NoGil());
  mamba.def("step", &MambaImpl::step, "hidden_states"_a, "conv_state"_a, "ssm_state"_a, NoGil());
  mamba.attr("__call__") = mamba.attr("forward");

  auto mamba2 = define_module<Mamba2Impl>(m, "Mamba2");
  mamba2.def(py::init(&make_mamba2), "d_model"_a, "d_state"_a = 128, "d_conv"_a = 4,
             "conv_init"_a = py::none(), "expand"_a = 2.0, "headdim"_a = 64, "d_ssm"_a = py::none(),
             "ngroups"_a = 1, "A_init_range"_a = Mamba2Options(0).A_init_range(),
             "D_has_hdim"_a = false, "rmsnorm"_a = true, "norm_before_gate"_a = false,
             "dt_min"_a = 0.001, "dt_max"_a = 0.1, "dt_init_floor"_a = 1e-4,
             "dt_limit"_a = Mamba2Options(0).dt_limit(), "bias"_a = false, "conv_bias"_a = true,
             "device"_a = py::none(), "dtype"_a = py::none());
  mamba2.def("forward", &Mamba2Impl::forward, "u"_a, "state"_a = py::none(),
             "seq_idx"_a = py::none(), "cu_seqlens"_a = py::none(), NoGil());
  mamba2.def("step", &Mamba2Impl::step, "hidden_states"_a, "conv_state"_a, "ssm_state"_a, NoGil());
  mamba2.attr("__call__") = mamba2.attr("forward");

  using Model = MambaLMHeadModelImpl;
  // The states are handles of the caller's tensors, which the model updates in place.
  const auto forward = [](Model& model, const Tensor& input_ids,
                          std::optional<std::vector<MambaState>> states, int64_t num_last_tokens,
                          const std::optional<Tensor>& seq_idx) {
    return model.forward(input_ids, states ? &*states : nullptr, num_last_tokens, seq_idx);
  };
  const auto generate =
      [](Model& model, const Tensor& input_ids, int64_t max_length, int64_t top_k, double top_p,
         double min_p, double temperature, double repetition_penalty, OptionalInt eos_token_id,
         std::optional<Tensor> lengths, OptionalInt pad_token_id, OptionalInt vocab_size,
         const std::optional<at::Generator>& generator, OptionalInt prefill_chunk_size,
         Dtype state_dtype, bool cg, GenerateOptions::OnTokens on_tokens,
         GenerateOptions::ShouldStop should_stop) {
        GenerateOptions options(max_length);
        options.top_k(top_k).top_p(top_p).min_p(min_p).temperature(temperature);
        options.repetition_penalty(repetition_penalty).eos_token_id(eos_token_id);
        options.pad_token_id(pad_token_id)
            .vocab_size(vocab_size)
            .generator(generator)
            .lengths(std::move(lengths));
        options.prefill_chunk_size(prefill_chunk_size).state_dtype(state_dtype).cg(cg);
        options.on_tokens(std::move(on_tokens)).should_stop(std::move(should_stop));
        return model.generate(input_ids, options);
      };
  auto model = define_module<Model>(m, "MambaLMHeadModel");
  model
      .def_static("from_pretrained", &Model::from_pretrained, "folder"_a, "dtype"_a = py::none(),
                  "device"_a = py::none(), NoGil())
      .def("save_pretrained", &Model::save_pretrained, "folder"_a, NoGil())
      .def("forward", forward, "input_ids"_a, "states"_a = py::none(), "num_last_tokens"_a = 0,
           "seq_idx"_a = py::none(), NoGil())
      .def("generate", generate, "input_ids"_a, "max_length"_a, "top_k"_a = 1, "top_p"_a = 0.0,
           "min_p"_a = 0.0, "temperature"_a = 1.0, "repetition_penalty"_a = 1.0,
           "eos_token_id"_a = py::none(), "lengths"_a = py::none(), "pad_token_id"_a = py::none(),
           "vocab_size"_a = py::none(), "generator"_a = py::none(),
           "prefill_chunk_size"_a = py::none(), "state_dtype"_a = py::none(), "cg"_a = false,
           "on_tokens"_a = py::none(), "should_stop"_a = py::none(), NoGil());
  model.attr("__call__") = model.attr("forward");
}
