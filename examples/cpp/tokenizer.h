// Byte-level BPE: text to token ids and back, as a tokenizer.json of the tokenizers library says.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

/// The tokenizer of GPT-2 and GPT-NeoX, which the published Mamba models use: added tokens, NFC,
/// GPT-2's split into words, byte-level BPE. Source: GPT-2's paper, section 2.2.
class Tokenizer {
 public:
  /// Reads a tokenizer.json. Raises std::runtime_error that names the file and what in it is
  /// malformed, or asks for something else than the above.
  explicit Tokenizer(const std::filesystem::path& path);

  /// The ids of a text in UTF-8, with those that the template puts around it. Raises
  /// std::runtime_error if the text is not UTF-8.
  std::vector<int64_t> encode(const std::string& text) const;

  /// The bytes of a token, which need not be whole characters. Empty for ids that there are not.
  std::string decode(int64_t id) const;

 private:
  using Pair = std::pair<int64_t, int64_t>;
  struct PairHash {
    size_t operator()(const Pair& pair) const {
      return static_cast<size_t>(pair.first * 1'000'003 + pair.second);
    }
  };
  struct Merge {
    size_t rank;
    int64_t id;
  };
  using AddedTokens = std::map<std::string, int64_t>;

  void append_text(std::string_view text, std::vector<int64_t>& ids) const;
  void append_words(std::string text, std::vector<int64_t>& ids) const;
  void append_word(std::string_view word, std::vector<int64_t>& ids) const;

  std::unordered_map<std::string, int64_t> vocabulary_;  // in the alphabet of the file
  std::unordered_map<Pair, Merge, PairHash> merges_;
  std::unordered_map<int64_t, std::string> bytes_;  // of each token
  AddedTokens raw_added_;                           // sought in the text as it is
  AddedTokens normalized_added_;                    // sought in the normalized text
  std::vector<int64_t> prefix_, suffix_;            // of every text
  bool nfc_ = false;
  bool add_prefix_space_ = false;
  bool ignore_merges_ = false;  // for words that are tokens
};
