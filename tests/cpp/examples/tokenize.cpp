// Token ids of texts, for tests/python/test_examples.py: tokenize TOKENIZER_JSON reads texts that
// end with NUL and writes for each a line of its ids, and one of the bytes of these ids, in
// hexadecimal.
#include <cstdio>
#include <exception>
#include <iostream>

#include "tokenizer.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  try {
    const Tokenizer tokenizer(argv[1]);
    for (std::string text; std::getline(std::cin, text, '\0');) {
      const std::vector<int64_t> ids = tokenizer.encode(text);
      for (const int64_t id : ids) std::printf("%lld ", static_cast<long long>(id));
      std::printf("\n");
      for (const int64_t id : ids) {
        for (const char c : tokenizer.decode(id))
          std::printf("%02x", static_cast<unsigned char>(c));
      }
      std::printf("\n");
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
