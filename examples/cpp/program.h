// What the examples' main functions share: arguments, and errors in a sentence.
#pragma once

#include <c10/util/Exception.h>

#include <charconv>
#include <exception>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

/// The arguments of a program: words by their place, `--flag value`, and `--switch`.
class Arguments {
 public:
  /// flags: each with its default value; a switch has the default "no". Raises
  /// std::invalid_argument for a flag that is not there, or without its value.
  Arguments(int argc, char** argv, std::map<std::string, std::string> flags)
      : flags_(std::move(flags)) {
    for (int i = 1; i < argc; ++i) {
      const std::string word = argv[i];
      if (word.rfind("--", 0) != 0) {
        words_.push_back(word);
        continue;
      }
      const auto flag = flags_.find(word.substr(2));
      if (flag == flags_.end()) throw std::invalid_argument("unknown argument " + word);
      if (flag->second == kNo) {
        flag->second = "yes";
      } else {
        if (i + 1 == argc) throw std::invalid_argument(word + " needs a value");
        flag->second = argv[++i];
      }
    }
  }

  const std::vector<std::string>& words() const { return words_; }
  const std::string& text(const std::string& flag) const { return flags_.at(flag); }
  bool has(const std::string& flag) const { return flags_.at(flag) != kNo; }

  /// Raises std::invalid_argument for what is no number of that type.
  template <class Number>
  Number number(const std::string& flag) const {
    Number number{};
    const std::string& text = flags_.at(flag);
    const char* const end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, number);
    if (error != std::errc() || stop != end) {
      throw std::invalid_argument("--" + flag + " must be a number, got " + text);
    }
    return number;
  }

 private:
  static constexpr char kNo[] = "no";

  std::map<std::string, std::string> flags_;
  std::vector<std::string> words_;
};

/// What main returns: that of run(), or after an exception, whose text goes to stderr, 2 for wrong
/// arguments and 1 otherwise.
template <class Run>
int run_program(const char* usage, const Run& run) {
  try {
    return run();
  } catch (const std::invalid_argument& error) {
    std::cerr << error.what() << "\nusage: " << usage;
    return 2;
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
  }
  return 1;
}
