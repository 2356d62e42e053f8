// Generates text with a byte-level language model: one token per byte.
//
//     mamba_generate CHECKPOINT_FOLDER [--prompt TEXT] [--bytes 256] [--seed 0]
//                    [--temperature 0.8] [--greedy]
//
// Writes prompt and continuation to stdout as they arise, and the speed to stderr. Equal arguments
// give equal bytes, those that the Python demo (python -m mamba_ssm demo) draws.
#include <ATen/CPUGeneratorImpl.h>
#include <c10/util/Exception.h>
#include <mamba_ssm/nn/model.h>

#include <charconv>
#include <chrono>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <system_error>

namespace {

struct Arguments {
  std::string checkpoint;
  std::string prompt = "\n";
  int64_t bytes = 256;
  uint64_t seed = 0;
  double temperature = 0.8;
  bool greedy = false;
};

constexpr char kUsage[] =
    "usage: mamba_generate CHECKPOINT_FOLDER [--prompt TEXT] [--bytes 256] [--seed 0]\n"
    "                      [--temperature 0.8] [--greedy]\n";

template <class Number>
Number parse_number(const std::string& flag, const std::string& text) {
  Number number{};
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || stop != end) {
    throw std::invalid_argument(flag + " must be a number, got " + text);
  }
  return number;
}

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) throw std::invalid_argument(flag + " needs a value");
      return argv[++i];
    };
    if (flag == "--prompt") {
      arguments.prompt = value();
    } else if (flag == "--bytes") {
      arguments.bytes = parse_number<int64_t>(flag, value());
    } else if (flag == "--seed") {
      arguments.seed = parse_number<uint64_t>(flag, value());
    } else if (flag == "--temperature") {
      arguments.temperature = parse_number<double>(flag, value());
    } else if (flag == "--greedy") {
      arguments.greedy = true;
    } else if (arguments.checkpoint.empty() && flag.rfind("--", 0) != 0) {
      arguments.checkpoint = flag;
    } else {
      throw std::invalid_argument("unknown argument " + flag);
    }
  }
  if (arguments.checkpoint.empty()) throw std::invalid_argument("CHECKPOINT_FOLDER is missing");
  if (arguments.prompt.empty()) throw std::invalid_argument("--prompt must not be empty");
  if (!(arguments.temperature > 0)) throw std::invalid_argument("--temperature must be positive");
  return arguments;
}

void generate(const Arguments& arguments) {
  mamba_ssm::MambaLMHeadModel model =
      mamba_ssm::MambaLMHeadModelImpl::from_pretrained(arguments.checkpoint);
  const int64_t vocab_size = model->config.vocab_size();
  if (vocab_size > 256) throw std::runtime_error("the checkpoint is not of a byte-level model");

  const auto length = static_cast<int64_t>(arguments.prompt.size());
  at::Tensor prompt = at::empty({1, length}, at::kLong);
  for (int64_t i = 0; i < length; ++i) {
    prompt[0][i] = static_cast<unsigned char>(arguments.prompt[i]);
  }
  const auto options = mamba_ssm::GenerateOptions(length + arguments.bytes)
                           .top_k(arguments.greedy ? 1 : 0)
                           .temperature(arguments.temperature)
                           .vocab_size(vocab_size)
                           .generator(at::make_generator<at::CPUGeneratorImpl>(arguments.seed))
                           .on_tokens([](const at::Tensor& tokens) {
                             std::cout << static_cast<char>(tokens.item<int64_t>()) << std::flush;
                           });

  std::cout << arguments.prompt << std::flush;
  const auto start = std::chrono::steady_clock::now();
  model->generate(prompt, options);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::cout << std::endl;
  std::cerr << arguments.bytes << " tokens after a prompt of " << arguments.prompt.size() << ", "
            << static_cast<double>(arguments.bytes) / seconds.count() << " tokens/s\n";
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  try {
    arguments = parse(argc, argv);
  } catch (const std::invalid_argument& error) {
    std::cerr << "mamba_generate: " << error.what() << "\n" << kUsage;
    return 2;
  }
  try {
    generate(arguments);
    return 0;
  } catch (const c10::Error& error) {
    std::cerr << "mamba_generate: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "mamba_generate: " << error.what() << "\n";
    return 1;
  }
}
