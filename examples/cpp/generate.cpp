// Generates text with a language model that Python or C++ has saved; see kUsage.
//
// The prompt's tokens are those of tokenizer.json, or one for each byte where the vocabulary has at
// most 256. Writes prompt and continuation to stdout as they arise, and the speed to stderr. With
// --ids, tokens are read from stdin, numbers between white space, and the new ones written to
// stdout. Equal arguments give equal tokens, those that Python's `generate` draws.
#include <ATen/Context.h>
#include <mamba_ssm/nn/model.h>

#include <charconv>
#include <chrono>
#include <filesystem>
#include <functional>
#include <iostream>
#include <iterator>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "program.h"
#ifdef HAVE_TOKENIZER
#include "tokenizer.h"
#endif

namespace {

constexpr char kUsage[] =
    "mamba_generate CHECKPOINT_FOLDER [--prompt TEXT] [--tokenizer FILE] [--ids]\n"
    "           [--tokens 256] [--seed 0] [--greedy] [--temperature 0.8] [--top-k 0] [--top-p 0]\n"
    "           [--min-p 0] [--repetition-penalty 1] [--dtype float32] [--device cpu] [--cg]\n"
    "--tokenizer: CHECKPOINT_FOLDER/tokenizer.json if it is there; --ids: token ids on stdin.\n"
    "--dtype: float32 or bfloat16; --device: cpu or cuda; --cg: with a CUDA graph.\n";

/// Text to tokens and back.
struct Encoding {
  std::function<std::vector<int64_t>(const std::string&)> encode;
  std::function<std::string(int64_t)> decode;
};

Encoding bytes() {
  return {[](const std::string& text) {
            std::vector<int64_t> ids;
            for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
            return ids;
          },
          [](int64_t id) { return std::string(1, static_cast<char>(id)); }};
}

/// Numbers between white space. Raises std::runtime_error for other things.
Encoding numbers() {
  return {[](const std::string& text) {
            std::vector<int64_t> ids;
            std::istringstream words(text);
            for (std::string word; words >> word;) {
              int64_t id;
              const auto [stop, error] =
                  std::from_chars(word.data(), word.data() + word.size(), id);
              if (error != std::errc() || stop != word.data() + word.size()) {
                throw std::runtime_error("stdin: " + word + " is no token id");
              }
              ids.push_back(id);
            }
            return ids;
          },
          [](int64_t id) { return std::to_string(id) + " "; }};
}

Encoding tokenizer_of(const std::string& path) {
#ifdef HAVE_TOKENIZER
  const auto tokenizer = std::make_shared<Tokenizer>(path);
  return {[=](const std::string& text) { return tokenizer->encode(text); },
          [=](int64_t id) { return tokenizer->decode(id); }};
#else
  throw std::runtime_error(path +
                           ": this program was built without utf8proc, which tokenizers need; "
                           "--ids works");
#endif
}

Encoding encoding_of(const Arguments& arguments, int64_t vocab_size) {
  if (arguments.has("ids")) return numbers();
  const auto beside = std::filesystem::path(arguments.words().front()) / "tokenizer.json";
  if (!arguments.text("tokenizer").empty()) return tokenizer_of(arguments.text("tokenizer"));
  if (std::filesystem::exists(beside)) return tokenizer_of(beside.string());
  if (vocab_size <= 256) return bytes();
  throw std::runtime_error("no tokenizer.json beside the checkpoint: give --tokenizer or --ids");
}

at::ScalarType dtype_of(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  throw std::invalid_argument("--dtype must be float32 or bfloat16, got " + name);
}

int generate(int argc, char** argv) {
  const Arguments arguments(argc, argv,
                            {{"prompt", "\n"},
                             {"tokenizer", ""},
                             {"ids", "no"},
                             {"tokens", "256"},
                             {"seed", "0"},
                             {"greedy", "no"},
                             {"temperature", "0.8"},
                             {"top-k", "0"},
                             {"top-p", "0"},
                             {"min-p", "0"},
                             {"repetition-penalty", "1"},
                             {"dtype", "float32"},
                             {"device", "cpu"},
                             {"cg", "no"}});
  if (arguments.words().size() != 1) throw std::invalid_argument("CHECKPOINT_FOLDER is missing");
  const at::Device device(arguments.text("device"));
  const auto new_tokens = arguments.number<int64_t>("tokens");
  const auto seed = arguments.number<uint64_t>("seed");
  mamba_ssm::GenerateOptions options(0);
  options.temperature(arguments.number<double>("temperature"))
      .top_k(arguments.has("greedy") ? 1 : arguments.number<int64_t>("top-k"))
      .top_p(arguments.number<double>("top-p"))
      .min_p(arguments.number<double>("min-p"))
      .repetition_penalty(arguments.number<double>("repetition-penalty"))
      .cg(arguments.has("cg"));

  mamba_ssm::MambaLMHeadModel model = mamba_ssm::MambaLMHeadModelImpl::from_pretrained(
      arguments.words().front(), dtype_of(arguments.text("dtype")), device);
  const int64_t vocab_size = model->config.vocab_size();
  const Encoding encoding = encoding_of(arguments, vocab_size);
  std::string text = arguments.text("prompt");
  if (arguments.has("ids")) text.assign(std::istreambuf_iterator<char>(std::cin), {});
  const std::vector<int64_t> ids = encoding.encode(text);
  if (ids.empty()) throw std::runtime_error("the prompt must not be empty");
  for (const int64_t id : ids) {
    if (id < 0 || id >= vocab_size) {
      throw std::runtime_error("the prompt has token " + std::to_string(id) +
                               ", of a vocabulary of " + std::to_string(vocab_size));
    }
  }

  at::Generator generator = at::globalContext().defaultGenerator(device).clone();
  generator.set_current_seed(seed);
  options.max_length(static_cast<int64_t>(ids.size()) + new_tokens)
      .vocab_size(vocab_size)
      .generator(generator)
      .on_tokens([&](const at::Tensor& tokens) {
        std::cout << encoding.decode(tokens.item<int64_t>()) << std::flush;
      });

  if (!arguments.has("ids")) std::cout << text << std::flush;
  const auto start = std::chrono::steady_clock::now();
  model->generate(at::tensor(ids, at::TensorOptions(at::kLong).device(device)).unsqueeze(0),
                  options);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::cout << std::endl;
  std::cerr << new_tokens << " tokens after a prompt of " << ids.size() << ", "
            << static_cast<double>(new_tokens) / seconds.count() << " tokens/s\n";
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program(kUsage, [&] { return generate(argc, argv); });
}
