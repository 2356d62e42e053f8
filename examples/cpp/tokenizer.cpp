#include "tokenizer.h"

#include <utf8proc.h>

#include <array>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace {

using Json = nlohmann::json;

[[noreturn]] void unsupported(const std::string& what) {
  throw std::runtime_error(what + " is not supported: only byte-level BPE with GPT-2's words is");
}

/// `json[key]`, or null.
const Json& member(const Json& json, const char* key) {
  static const Json null;
  return json.is_object() && json.contains(key) ? json[key] : null;
}

std::string type_of(const Json& json) { return member(json, "type").get<std::string>(); }

/// The steps of a member that may be null, one step, or a Sequence of them.
std::vector<Json> steps_of(const Json& json, const char* list) {
  if (json.is_null()) return {};
  if (type_of(json) != "Sequence") return {json};
  return member(json, list).get<std::vector<Json>>();
}

std::string utf8(int32_t codepoint) {
  std::array<utf8proc_uint8_t, 4> bytes;
  const auto size = utf8proc_encode_char(codepoint, bytes.data());
  return {reinterpret_cast<const char*>(bytes.data()), static_cast<size_t>(size)};
}

/// The character at the front of a text, and its bytes.
struct Character {
  int32_t codepoint;
  size_t size;
};

Character first_of(std::string_view text) {
  int32_t codepoint;
  const auto size = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                     static_cast<utf8proc_ssize_t>(text.size()), &codepoint);
  if (size <= 0) throw std::runtime_error("the text is not UTF-8");
  return {codepoint, static_cast<size_t>(size)};
}

std::string to_nfc(const std::string& text) {
  utf8proc_uint8_t* normalized = nullptr;
  const auto size =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                   static_cast<utf8proc_ssize_t>(text.size()), &normalized,
                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(normalized, &std::free);
  if (size < 0) throw std::runtime_error("the text is not UTF-8");
  return {reinterpret_cast<const char*>(normalized), static_cast<size_t>(size)};
}

/// The alphabet of byte-level BPE: a printable character for each byte, itself if it is one in
/// Latin-1, else the next one from U+0100 on.
const std::array<std::string, 256>& alphabet() {
  static const auto characters = [] {
    std::array<std::string, 256> result;
    int32_t next = 256;
    for (int32_t byte = 0; byte < 256; ++byte) {
      const bool is_printable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte != 0xad);
      result[static_cast<size_t>(byte)] = utf8(is_printable ? byte : next++);
    }
    return result;
  }();
  return characters;
}

enum class Kind { kLetter, kNumber, kSpace, kOther };

Kind kind_of(int32_t codepoint) {
  switch (utf8proc_category(codepoint)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
      return Kind::kLetter;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
      return Kind::kNumber;
    case UTF8PROC_CATEGORY_ZS:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
      return Kind::kSpace;
    default:
      return (codepoint >= 0x9 && codepoint <= 0xd) || codepoint == 0x85 ? Kind::kSpace
                                                                         : Kind::kOther;
  }
}

/// Bytes of the first word of a text that is not empty. A word is an English ending behind its
/// apostrophe; letters, numbers, or other characters, of one kind, with one space U+0020 before
/// them; or spaces, of which the last one is left to the word behind them.
size_t first_word(std::string_view text) {
  for (const char* ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"}) {
    if (text.rfind(ending, 0) == 0) return std::string_view(ending).size();
  }
  size_t size = text[0] == ' ' && text.size() > 1 ? 1 : 0;
  const Kind kind = kind_of(first_of(text.substr(size)).codepoint);
  if (kind == Kind::kSpace) size = 0;
  size_t last = 0;  // where the last character begins
  while (size < text.size()) {
    const Character character = first_of(text.substr(size));
    if (kind_of(character.codepoint) != kind) break;
    last = size;
    size += character.size;
  }
  return kind == Kind::kSpace && size < text.size() && last > 0 ? last : size;
}

/// Calls between(text) for what is between added tokens, of which the longest is taken at each
/// place, and appends their ids.
template <class Between>
void split_at(const std::map<std::string, int64_t>& added, std::string_view text,
              std::vector<int64_t>& ids, const Between& between) {
  size_t begin = 0;
  for (size_t i = 0; i < text.size() && !added.empty();) {
    const std::pair<const std::string, int64_t>* found = nullptr;
    for (const auto& token : added) {
      const bool is_here = text.compare(i, token.first.size(), token.first) == 0;
      if (is_here && (found == nullptr || token.first.size() > found->first.size())) found = &token;
    }
    if (found == nullptr) {
      ++i;
      continue;
    }
    if (i > begin) between(text.substr(begin, i - begin));
    ids.push_back(found->second);
    begin = i += found->first.size();
  }
  if (begin < text.size()) between(text.substr(begin));
}

}  // namespace

Tokenizer::Tokenizer(const std::filesystem::path& path) try {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot be read");
  const Json json = Json::parse(file);

  const Json& model = member(json, "model");
  if (type_of(model) != "BPE") unsupported("model " + type_of(model));
  for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
    const Json& value = member(model, key);
    if (!value.is_null() && value != "") unsupported(key);
  }
  if (member(model, "byte_fallback") == true) unsupported("byte_fallback");
  ignore_merges_ = member(model, "ignore_merges") == true;
  vocabulary_ = member(model, "vocab").get<decltype(vocabulary_)>();
  const auto id_of = [&](const std::string& token) {
    const auto entry = vocabulary_.find(token);
    if (entry == vocabulary_.end()) throw std::runtime_error("no token " + Json(token).dump());
    return entry->second;
  };
  for (const Json& merge : member(model, "merges")) {
    std::pair<std::string, std::string> parts;  // ["a", "b"], in older files "a b"
    if (merge.is_array()) {
      parts = merge.get<decltype(parts)>();
    } else {
      const auto text = merge.get<std::string>();
      const size_t space = text.find(' ');
      parts = {text.substr(0, space), text.substr(space + 1)};
    }
    merges_.try_emplace({id_of(parts.first), id_of(parts.second)},
                        Merge{merges_.size(), id_of(parts.first + parts.second)});
  }

  std::unordered_map<std::string, char> byte_of;
  for (size_t byte = 0; byte < 256; ++byte) byte_of[alphabet()[byte]] = static_cast<char>(byte);
  for (const auto& [token, id] : vocabulary_) {
    std::string bytes;
    for (size_t i = 0; i < token.size();) {
      const std::string character = token.substr(i, first_of(token.substr(i)).size);
      const auto byte = byte_of.find(character);
      bytes += byte == byte_of.end() ? character : std::string(1, byte->second);
      i += character.size();
    }
    bytes_[id] = std::move(bytes);
  }

  for (const Json& step : steps_of(member(json, "normalizer"), "normalizers")) {
    if (type_of(step) != "NFC") unsupported("normalizer " + type_of(step));
    nfc_ = true;
  }
  for (const Json& token : member(json, "added_tokens")) {
    const auto content = token.at("content").get<std::string>();
    for (const char* key : {"lstrip", "rstrip", "single_word"}) {
      if (member(token, key) == true) unsupported(key + (" of the added token " + content));
    }
    const bool is_normalized = member(token, "normalized") == true;
    const auto id = token.at("id").get<int64_t>();
    (is_normalized ? normalized_added_
                   : raw_added_)[is_normalized && nfc_ ? to_nfc(content) : content] = id;
    bytes_[id] = content;
  }
  for (const Json& step : steps_of(member(json, "pre_tokenizer"), "pretokenizers")) {
    if (type_of(step) != "ByteLevel") unsupported("pre_tokenizer " + type_of(step));
    if (member(step, "use_regex") == false) unsupported("use_regex false");
    add_prefix_space_ = member(step, "add_prefix_space") == true;
  }
  for (const Json& step : steps_of(member(json, "post_processor"), "processors")) {
    if (type_of(step) == "ByteLevel") continue;  // about positions in the text
    if (type_of(step) != "TemplateProcessing") unsupported("post_processor " + type_of(step));
    auto* ids = &prefix_;
    for (const Json& piece : step.at("single")) {
      if (piece.contains("Sequence")) {
        ids = &suffix_;
        continue;
      }
      const auto name = piece.at("SpecialToken").at("id").get<std::string>();
      for (const Json& id : step.at("special_tokens").at(name).at("ids")) ids->push_back(id);
    }
  }
} catch (const std::exception& error) {
  throw std::runtime_error(path.string() + ": " + error.what());
}

std::vector<int64_t> Tokenizer::encode(const std::string& text) const {
  std::vector<int64_t> ids = prefix_;
  split_at(raw_added_, text, ids, [&](std::string_view piece) { append_text(piece, ids); });
  ids.insert(ids.end(), suffix_.begin(), suffix_.end());
  return ids;
}

std::string Tokenizer::decode(int64_t id) const {
  const auto bytes = bytes_.find(id);
  return bytes == bytes_.end() ? "" : bytes->second;
}

void Tokenizer::append_text(std::string_view text, std::vector<int64_t>& ids) const {
  const std::string normalized = nfc_ ? to_nfc(std::string(text)) : std::string(text);
  split_at(normalized_added_, normalized, ids,
           [&](std::string_view piece) { append_words(std::string(piece), ids); });
}

void Tokenizer::append_words(std::string text, std::vector<int64_t>& ids) const {
  if (add_prefix_space_ && text[0] != ' ') text.insert(text.begin(), ' ');
  for (std::string_view rest = text; !rest.empty();) {
    const size_t size = first_word(rest);
    append_word(rest.substr(0, size), ids);
    rest.remove_prefix(size);
  }
}

void Tokenizer::append_word(std::string_view word, std::vector<int64_t>& ids) const {
  std::string characters;
  std::vector<int64_t> symbols;
  for (const char c : word) {
    const std::string& character = alphabet()[static_cast<unsigned char>(c)];
    characters += character;
    const auto entry = vocabulary_.find(character);
    if (entry == vocabulary_.end()) throw std::runtime_error("no token for a byte of the text");
    symbols.push_back(entry->second);
  }
  if (const auto whole = vocabulary_.find(characters);
      ignore_merges_ && whole != vocabulary_.end()) {
    ids.push_back(whole->second);
    return;
  }
  // The best merge everywhere, until there is none.
  for (;;) {
    const Merge* best = nullptr;
    Pair best_pair;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      const Pair pair(symbols[i], symbols[i + 1]);
      const auto merge = merges_.find(pair);
      if (merge != merges_.end() && (best == nullptr || merge->second.rank < best->rank)) {
        best = &merge->second;
        best_pair = pair;
      }
    }
    if (best == nullptr) break;
    size_t size = 0;
    for (size_t i = 0; i < symbols.size(); ++i) {
      const bool is_pair = symbols[i] == best_pair.first && i + 1 < symbols.size() &&
                           symbols[i + 1] == best_pair.second;
      symbols[size++] = is_pair ? best->id : symbols[i];
      if (is_pair) ++i;
    }
    symbols.resize(size);
  }
  ids.insert(ids.end(), symbols.begin(), symbols.end());
}
