// The safetensors reader and writer: what is right comes back, what is wrong is named.
#include <ATen/Functions.h>
#include <mamba_ssm/io/safetensors.h>
#include <sys/stat.h>
#include <torch/nn/modules/linear.h>
#include <unistd.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <vector>

#include "temporary_folder.h"

using at::Tensor;
using Catch::Matchers::ContainsSubstring;
using mamba_ssm::load_safetensors;
using mamba_ssm::load_safetensors_shards;
using mamba_ssm::save_safetensors;

namespace {

std::string length_bytes(uint64_t length) {
  std::string bytes(8, '\0');
  for (int i = 0; i < 8; ++i) bytes[static_cast<size_t>(i)] = static_cast<char>(length >> (8 * i));
  return bytes;
}

/// A file with this header, right or wrong, and as many bytes of data.
std::string file_of(const std::string& header, size_t data_size = 0) {
  return length_bytes(header.size()) + header + std::string(data_size, '\0');
}

std::string info(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

/// A header of one tensor "a": [2, 2] of F32 in 16 bytes, unless told otherwise.
std::string header_of(const std::string& dtype = R"("F32")", const std::string& shape = "[2,2]",
                      const std::string& offsets = "[0,16]") {
  return R"({"a":)" + info(dtype, shape, offsets) + "}";
}

std::string header_of_two(const std::string& first, const std::string& second) {
  return R"({"a":)" + info(R"("U8")", "[4]", first) + R"(,"b":)" + info(R"("U8")", "[4]", second) +
         "}";
}

std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

bool same_bytes(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  const Tensor dense_a = a.contiguous(), dense_b = b.contiguous();
  return a.numel() == 0 ||
         std::memcmp(dense_a.const_data_ptr(), dense_b.const_data_ptr(), dense_a.nbytes()) == 0;
}

struct MalformedFile {
  const char* what;
  std::string bytes;
  const char* fault;
};

std::vector<MalformedFile> malformed_files() {
  const char* const kHeader = "InvalidHeaderDeserialization";
  const std::string valid = header_of();
  const std::string f32 = R"("F32")";
  std::vector<MalformedFile> files = {
      {"empty file", "", "HeaderTooSmall"},
      {"one byte", "\x01", "HeaderTooSmall"},
      {"seven bytes", std::string(7, '\0'), "HeaderTooSmall"},

      {"header of length 0", length_bytes(0), "InvalidHeaderStart"},
      {"header of length 1", length_bytes(1) + "{", kHeader},
      {"header longer than the file", length_bytes(valid.size() + 1) + valid,
       "InvalidHeaderLength"},
      {"header length includes itself", length_bytes(valid.size() + 8) + valid,
       "InvalidHeaderLength"},
      {"header of 100 MB + 1", length_bytes(100'000'001) + valid, "HeaderTooLarge"},
      {"header of 2^63", length_bytes(uint64_t{1} << 63) + valid, "HeaderTooLarge"},
      {"header of 2^64 - 1", length_bytes(~uint64_t{0}) + valid, "HeaderTooLarge"},
      {"header of 2^64 - 8: length + 8 wraps", length_bytes(~uint64_t{7}) + valid,
       "HeaderTooLarge"},

      {"space before the header", file_of(" " + valid, 16), "InvalidHeaderStart"},
      {"a list", file_of("[]"), "InvalidHeaderStart"},
      {"a byte order mark", file_of("\xef\xbb\xbf" + valid, 16), "InvalidHeaderStart"},
      {"not UTF-8", file_of("{\"\xff\":" + info(f32, "[2,2]", "[0,16]") + "}", 16), kHeader},
      {"overlong UTF-8", file_of("{\"\xc0\xaf\":" + info(f32, "[2,2]", "[0,16]") + "}", 16),
       kHeader},
      {"half a surrogate", file_of(R"({"\ud800":)" + info(f32, "[2,2]", "[0,16]") + "}", 16),
       kHeader},
      {"truncated JSON", file_of(valid.substr(0, valid.size() - 1), 16), kHeader},
      {"bytes after the JSON", file_of(valid + "x", 16), kHeader},
      {"a second JSON value", file_of(valid + "{}", 16), kHeader},
      {"NUL after the JSON", file_of(valid + std::string(1, '\0'), 16), kHeader},
      {"a comment", file_of("{/**/" + valid.substr(1), 16), kHeader},
      {"a trailing comma", file_of(valid.substr(0, valid.size() - 1) + ",}", 16), kHeader},
      {"10,000 nested lists", file_of(R"({"a":)" + std::string(10'000, '[')), kHeader},
      {"10,000 nested objects",
       [] {
         std::string header = "{";
         for (int i = 0; i < 10'000; ++i) header += R"("a":{)";
         return file_of(header);
       }(),
       kHeader},

      {"a tensor twice",
       file_of(valid.substr(0, valid.size() - 1) + R"(,"a":)" + info(f32, "[2,2]", "[0,16]") + "}",
               16),
       kHeader},
      {"a field twice",
       file_of(R"({"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}})", 16),
       kHeader},
      {"a shape twice",
       file_of(R"({"a":{"dtype":"F32","shape":[4],"shape":[4],"data_offsets":[0,16]}})", 16),
       kHeader},
      {"an unknown field",
       file_of(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16],"x":1}})", 16), kHeader},
      {"a tensor that is a number", file_of(R"({"a":1})"), kHeader},
      {"a tensor that is a list", file_of(R"({"a":[]})"), kHeader},
      {"a tensor that is null", file_of(R"({"a":null})"), kHeader},
      {"a tensor without fields", file_of(R"({"a":{}})"), kHeader},

      {"no dtype", file_of(R"({"a":{"shape":[4],"data_offsets":[0,16]}})", 16), kHeader},
      {"unknown dtype", file_of(header_of(R"("F31")"), 16), kHeader},
      {"dtype in lower case", file_of(header_of(R"("f32")"), 16), kHeader},
      {"dtype of less than a byte", file_of(header_of(R"("F4")", "[3]", "[0,2]"), 2), kHeader},
      {"dtype that is a number", file_of(header_of("32"), 16), kHeader},
      {"dtype that is a list", file_of(header_of(R"(["F32"])"), 16), kHeader},

      {"no shape", file_of(R"({"a":{"dtype":"F32","data_offsets":[0,16]}})", 16), kHeader},
      {"shape that is a number", file_of(header_of(f32, "4"), 16), kHeader},
      {"shape that is a string", file_of(header_of(f32, R"("4")"), 16), kHeader},
      {"shape with a string", file_of(header_of(f32, R"(["4"])"), 16), kHeader},
      {"negative shape", file_of(header_of(f32, "[-2,-2]"), 16), kHeader},
      {"fractional shape", file_of(header_of(f32, "[4.0]"), 16), kHeader},
      {"shape with an exponent", file_of(header_of(f32, "[4e0]"), 16), kHeader},
      {"shape with a bool", file_of(header_of(f32, "[true,4]"), 16), kHeader},
      {"nested shape", file_of(header_of(f32, "[[4]]"), 16), kHeader},
      {"shape of 2^64", file_of(header_of(f32, "[18446744073709551616]"), 16), kHeader},
      {"shape of 2^63", file_of(header_of(f32, "[9223372036854775808]"), 16), "ValidationOverflow"},
      {"product of the shape wraps to 4",
       file_of(header_of(f32, "[4194305,4194305,211106198978564]"), 16), "ValidationOverflow"},
      {"bytes of the shape wrap to 16", file_of(header_of(f32, "[4611686018427387908]"), 16),
       "ValidationOverflow"},
      {"strides of an empty shape overflow",
       file_of(header_of(f32, "[4611686018427387904,4,0]", "[0,0]")), "ValidationOverflow"},
      {"65 dimensions",
       [&] {
         std::string shape = "[4";
         for (int i = 1; i < 65; ++i) shape += ",1";
         return file_of(header_of(f32, shape + "]"), 16);
       }(),
       "TensorInvalidInfo"},
      {"shape larger than the range", file_of(header_of(f32, "[5]"), 16), "TensorInvalidInfo"},
      {"shape smaller than the range", file_of(header_of(f32, "[3]"), 16), "TensorInvalidInfo"},
      {"an empty tensor with bytes", file_of(header_of(f32, "[0]"), 16), "TensorInvalidInfo"},
      {"a wider dtype than the range", file_of(header_of(R"("F64")"), 16), "TensorInvalidInfo"},

      {"no offsets", file_of(R"({"a":{"dtype":"F32","shape":[4]}})", 16), kHeader},
      {"empty offsets", file_of(header_of(f32, "[4]", "[]"), 16), kHeader},
      {"one offset", file_of(header_of(f32, "[4]", "[16]"), 16), kHeader},
      {"three offsets", file_of(header_of(f32, "[4]", "[0,8,16]"), 16), kHeader},
      {"many offsets", file_of(header_of(f32, "[4]", "[0,8,16,24,32]"), 16), kHeader},
      {"offsets that are a number", file_of(header_of(f32, "[4]", "16"), 16), kHeader},
      {"negative offset", file_of(header_of(f32, "[4]", "[-16,0]"), 16), kHeader},
      {"fractional offset", file_of(header_of(f32, "[4]", "[0,16.0]"), 16), kHeader},
      {"reversed offsets", file_of(header_of(f32, "[4]", "[16,0]"), 16), "InvalidOffset"},
      {"reversed offsets at 0", file_of(header_of_two("[0,4]", "[4,0]"), 8), "InvalidOffset"},
      {"offset of 2^64 - 1", file_of(header_of(f32, "[4]", "[0,18446744073709551615]"), 16),
       "TensorInvalidInfo"},
      {"overlapping tensors", file_of(header_of_two("[0,4]", "[2,6]"), 6), "InvalidOffset"},
      {"tensors in one place", file_of(header_of_two("[0,4]", "[0,4]"), 4), "InvalidOffset"},
      {"a gap between tensors", file_of(header_of_two("[0,4]", "[8,12]"), 12), "InvalidOffset"},
      {"a gap before the first tensor", file_of(header_of_two("[4,8]", "[8,12]"), 12),
       "InvalidOffset"},
      {"an empty tensor inside another",
       file_of(R"({"a":)" + info(R"("U8")", "[4]", "[0,4]") + R"(,"b":)" +
                   info(R"("U8")", "[0]", "[2,2]") + "}",
               4),
       "InvalidOffset"},
      {"bytes after the last tensor", file_of(valid, 17), "MetadataIncompleteBuffer"},
      {"a byte less than the tensors take", file_of(valid, 15), "MetadataIncompleteBuffer"},
      {"no data", file_of(valid, 0), "MetadataIncompleteBuffer"},
      {"data without tensors", file_of("{}", 1), "MetadataIncompleteBuffer"},

      {"metadata that is a list", file_of(R"({"__metadata__":[]})"), kHeader},
      {"metadata that is a string", file_of(R"({"__metadata__":"a"})"), kHeader},
      {"metadata with a number", file_of(R"({"__metadata__":{"a":1}})"), kHeader},
      {"metadata with an object", file_of(R"({"__metadata__":{"a":{}}})"), kHeader},
      {"metadata with null", file_of(R"({"__metadata__":{"a":null}})"), kHeader},
      {"metadata twice", file_of(R"({"__metadata__":{},"__metadata__":{}})"), kHeader},
      {"a metadata key twice", file_of(R"({"__metadata__":{"a":"b","a":"b"}})"), kHeader},

      {"an empty name", file_of(R"({"":)" + info(f32, "[4]", "[0,16]") + "}", 16), kHeader},
      {"NUL in a name", file_of(R"({"a\u0000b":)" + info(f32, "[4]", "[0,16]") + "}", 16), kHeader},
      {"a name of 1 MB",
       file_of(R"({")" + std::string(1'000'000, 'a') + R"(":)" + info(f32, "[4]", "[0,16]") + "}",
               16),
       kHeader},
  };
  return files;
}

}  // namespace

TEST_CASE("a malformed safetensors file is refused with its fault", "[safetensors]") {
  const TemporaryFolder folder;
  for (const auto& [what, bytes, fault] : malformed_files()) {
    CAPTURE(what);
    const auto path = write(folder / "malformed.safetensors", bytes);
    CHECK_THROWS_WITH(load_safetensors(path), ContainsSubstring(std::string(fault) + ": ") &&
                                                  ContainsSubstring(path.string()));
    CHECK_THROWS_AS(load_safetensors(path), std::runtime_error);
  }
}

TEST_CASE("no truncation and no flipped bit of a file is a memory error", "[safetensors]") {
  const TemporaryFolder folder;
  const auto path = folder / "file.safetensors";
  save_safetensors(path, {{"weight", at::ones({3, 1000})}, {"bias", at::ones({7}, at::kHalf)}},
                   {{"format", "pt"}});
  const std::string bytes = read(path);
  const size_t header_end = 8 + static_cast<unsigned char>(bytes[0]) +
                            256 * static_cast<size_t>(static_cast<unsigned char>(bytes[1]));

  for (size_t size = 0; size < bytes.size(); size += size < header_end ? 1 : 1021) {
    CHECK_THROWS_AS(load_safetensors(write(path, bytes.substr(0, size))), std::runtime_error);
  }
  for (size_t i = 0; i < header_end; ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string flipped = bytes;
      flipped[i] = static_cast<char>(flipped[i] ^ (1 << bit));
      write(path, flipped);
      try {  // a flipped bit of a name or of the metadata is no fault
        double sum = 0;
        for (const auto& [name, tensor] : load_safetensors(path)) {
          sum += tensor.to(at::kDouble).sum().item<double>();
        }
        CHECK(!std::isinf(sum));
      } catch (const std::runtime_error& error) {
        CHECK_THAT(error.what(), ContainsSubstring("load_safetensors: "));
      }
    }
  }
}

TEST_CASE("what is not a readable regular file is refused at once", "[safetensors]") {
  const TemporaryFolder folder;
  CHECK_THROWS_WITH(load_safetensors(folder / "absent"), ContainsSubstring("IoError: cannot open"));
  CHECK_THROWS_WITH(load_safetensors(folder.path()), ContainsSubstring("IoError: not a regular"));
  REQUIRE(::mkfifo((folder / "fifo").c_str(), 0600) == 0);
  CHECK_THROWS_WITH(load_safetensors(folder / "fifo"), ContainsSubstring("IoError: not a regular"));
  CHECK_THROWS_WITH(load_safetensors("/dev/zero"), ContainsSubstring("IoError: not a regular"));
  if (::geteuid() != 0) {  // root may read everything
    write(folder / "secret", file_of("{}"));
    std::filesystem::permissions(folder / "secret", std::filesystem::perms::none);
    CHECK_THROWS_WITH(load_safetensors(folder / "secret"), ContainsSubstring("IoError"));
  }
}

TEST_CASE("unusual but valid files load", "[safetensors]") {
  const TemporaryFolder folder;
  const auto path = folder / "file.safetensors";

  SECTION("no tensors") { CHECK(load_safetensors(write(path, file_of("{}"))).empty()); }
  SECTION("spaces after the header") {
    CHECK(load_safetensors(write(path, file_of(header_of() + "     ", 16))).size() == 1);
  }
  SECTION("the order of names is not the order of offsets") {
    const auto tensors =
        load_safetensors(write(path, file_of(header_of_two("[4,8]", "[0,4]")) + "bbbbaaaa"));
    CHECK(tensors.at("a").eq('a').all().item<bool>());
    CHECK(tensors.at("b").eq('b').all().item<bool>());
  }
  SECTION("an empty tensor where another begins") {
    const auto tensors = load_safetensors(
        write(path, file_of(R"({"a":)" + info(R"("U8")", "[4]", "[0,4]") + R"(,"b":)" +
                                info(R"("F32")", "[3,0]", "[0,0]") + R"(,"c":)" +
                                info(R"("F32")", "[0]", "[4,4]") + "}",
                            4)));
    CHECK(tensors.at("b").sizes() == at::IntArrayRef({3, 0}));
    CHECK(tensors.at("c").sizes() == at::IntArrayRef({0}));
  }
  SECTION("a scalar, and 64 dimensions") {
    std::string shape = "[1";
    for (int i = 1; i < 64; ++i) shape += ",1";
    const auto tensors = load_safetensors(
        write(path, file_of(R"({"a":)" + info(R"("F32")", "[]", "[0,4]") + R"(,"b":)" +
                                info(R"("F32")", shape + "]", "[4,8]") + "}",
                            8)));
    CHECK(tensors.at("a").dim() == 0);
    CHECK(tensors.at("b").dim() == 64);
  }
  SECTION("data that is not aligned") {
    const float value = 1.5f;
    std::string data(sizeof(value), '\0');
    std::memcpy(data.data(), &value, sizeof(value));
    for (int pad = 0; pad < 4; ++pad) {
      const std::string header =
          header_of(R"("F32")", "[1]", "[0,4]") + std::string(static_cast<size_t>(pad), ' ');
      CHECK(load_safetensors(write(path, file_of(header) + data)).at("a").item<float>() == value);
    }
  }
  SECTION("a boolean is any byte but 0") {
    const Tensor a = load_safetensors(write(path, file_of(header_of(R"("BOOL")", "[4]", "[0,4]")) +
                                                      std::string("\0\1\2\xff", 4)))
                         .at("a");
    CHECK(a.to(at::kByte).eq(at::tensor({0, 1, 1, 1}, at::kByte)).all().item<bool>());
  }
  SECTION("a name is a name, not a path") {
    const auto tensors = load_safetensors(
        write(path, file_of(R"({"../../a":)" + info(R"("F32")", "[4]", "[0,16]") + "}", 16)));
    CHECK(tensors.count("../../a") == 1);
    torch::nn::Linear linear(2, 2);
    CHECK_THROWS_WITH(mamba_ssm::load_state_dict(*linear, tensors),
                      ContainsSubstring("unexpected: \"../../a\""));
  }
  SECTION("metadata of 10 MB") {
    std::map<std::string, std::string> metadata;
    const std::string value(10'000'000, 'x');
    load_safetensors(write(path, file_of(R"({"__metadata__":{"a":")" + value + "\"}}")), &metadata);
    CHECK(metadata.at("a") == value);
  }
  SECTION("100,000 tensors") {
    std::string header = "{";
    for (int i = 0; i < 100'000; ++i) {
      header += '"' + std::to_string(i) + "\":" + info(R"("F32")", "[0]", "[0,0]") + ",";
    }
    header.back() = '}';
    CHECK(load_safetensors(write(path, file_of(header))).size() == 100'000);
  }
  SECTION("through a symbolic link") {
    write(path, file_of(header_of(), 16));
    std::filesystem::create_symlink(path, folder / "link");
    CHECK(load_safetensors(folder / "link").size() == 1);
  }
}

TEST_CASE("tensors of every dtype survive a round trip", "[safetensors]") {
  const TemporaryFolder folder;
  const auto path = folder / "file.safetensors";
  const at::ScalarType dtypes[] = {
      at::kByte,   at::kChar,     at::kFloat8_e5m2,  at::kFloat8_e4m3fn, at::kShort, at::kUInt16,
      at::kHalf,   at::kBFloat16, at::kInt,          at::kUInt32,        at::kFloat, at::kLong,
      at::kUInt64, at::kDouble,   at::kComplexFloat, at::kFloat8_e8m0fnu};
  std::map<std::string, Tensor> tensors;
  for (const at::ScalarType dtype : dtypes) {
    Tensor tensor = at::empty({3, 5}, dtype);
    auto* bytes = static_cast<unsigned char*>(tensor.mutable_data_ptr());
    for (size_t i = 0; i < tensor.nbytes(); ++i) bytes[i] = static_cast<unsigned char>(37 * i + 11);
    tensors[c10::toString(dtype)] = tensor;
  }
  tensors["bool"] = at::arange(6).remainder(2).to(at::kBool);
  tensors["scalar"] = at::full({}, 3.5);
  tensors["empty"] = at::empty({0, 4});
  tensors["transposed"] = at::arange(6.0).view({2, 3}).t();
  tensors["expanded"] = at::ones({1}).expand({4});
  tensors["conjugate"] = at::complex(at::ones({2}), at::ones({2})).conj();
  tensors["not finite"] = at::tensor({std::nanf(""), std::numeric_limits<float>::infinity()});
  tensors["\xce\xb1.\"quoted\".weight"] = at::ones({1});

  save_safetensors(path, tensors, {{"format", "pt"}, {"empty", ""}});
  std::map<std::string, std::string> metadata;
  const auto loaded = load_safetensors(path, &metadata);

  CHECK(metadata == std::map<std::string, std::string>{{"format", "pt"}, {"empty", ""}});
  REQUIRE(loaded.size() == tensors.size());
  for (const auto& [name, tensor] : tensors) {
    CAPTURE(name);
    CHECK(same_bytes(loaded.at(name), tensor.resolve_conj()));
    CHECK(reinterpret_cast<uintptr_t>(loaded.at(name).const_data_ptr()) %
              c10::elementSize(tensor.scalar_type()) ==
          0);
  }
  const std::string bytes = read(path);
  save_safetensors(path, tensors, {{"format", "pt"}, {"empty", ""}});
  CHECK(read(path) == bytes);
}

TEST_CASE("loaded tensors are independent of the file", "[safetensors]") {
  const TemporaryFolder folder;
  const auto path = folder / "file.safetensors";
  save_safetensors(path, {{"a", at::ones({1000})}, {"b", at::ones({3})}});
  const std::string bytes = read(path);
  Tensor a = load_safetensors(path).at("a");  // the other tensor is gone

  a.fill_(2);
  CHECK(read(path) == bytes);
  CHECK(load_safetensors(path).at("a").eq(1).all().item<bool>());

  save_safetensors(path, {{"a", at::zeros({1000})}});
  CHECK(a.eq(2).all().item<bool>());
  std::filesystem::remove(path);
  CHECK(a.eq(2).all().item<bool>());
}

TEST_CASE("a failed save leaves the old file and nothing else", "[safetensors]") {
  const TemporaryFolder folder;
  const auto path = folder / "file.safetensors";
  save_safetensors(path, {{"a", at::ones({1})}});
  const std::string bytes = read(path);

  CHECK_THROWS_WITH(save_safetensors(path, {{"\xff", at::ones({1})}}), ContainsSubstring("UTF-8"));
  CHECK_THROWS_AS(save_safetensors(path, {{"", at::ones({1})}}), std::runtime_error);
  CHECK_THROWS_AS(save_safetensors(path, {{"__metadata__", at::ones({1})}}), std::runtime_error);
  CHECK_THROWS_WITH(save_safetensors(path, {{"a", Tensor()}}), ContainsSubstring("\"a\""));
  CHECK_THROWS_WITH(save_safetensors(path, {{"a", at::ones({1}, at::kComplexDouble)}}),
                    ContainsSubstring("ComplexDouble"));
  CHECK_THROWS_WITH(save_safetensors(path, {{"a", at::empty({1}, at::kMeta)}}),
                    ContainsSubstring("dense"));
  CHECK_THROWS_WITH(save_safetensors(folder / "absent" / "file", {}), ContainsSubstring("IoError"));
  CHECK_THROWS_WITH(save_safetensors(folder.path(), {}), ContainsSubstring("IoError"));

  CHECK(read(path) == bytes);
  const auto left = std::filesystem::directory_iterator(folder.path());
  CHECK(std::distance(begin(left), end(left)) == 1);
}

TEST_CASE("load_state_dict names every tensor that does not fit", "[safetensors]") {
  torch::nn::Linear linear(2, 3);
  const auto before = mamba_ssm::state_dict(*linear);
  const Tensor weight = before.at("weight").clone();
  const std::map<std::string, Tensor> wrong = {{"weight", at::ones({2, 3})},
                                               {"extra", at::ones({1})}};
  CHECK_THROWS_WITH(
      mamba_ssm::load_state_dict(*linear, wrong),
      ContainsSubstring("mismatched: \"weight\" must be Float [3, 2], got Float [2, 3]") &&
          ContainsSubstring("missing: \"bias\"") && ContainsSubstring("unexpected: \"extra\""));
  CHECK_THROWS_WITH(
      mamba_ssm::load_state_dict(
          *linear, {{"weight", at::ones({3, 2}, at::kLong)}, {"bias", at::ones({3})}}),
      ContainsSubstring("mismatched: \"weight\" must be Float [3, 2], got Long [3, 2]"));
  CHECK(linear->weight.equal(weight));

  mamba_ssm::load_state_dict(*linear, {{"weight", at::full({3, 2}, 2, at::kHalf)},
                                       {"bias", at::full({3}, 3, at::kDouble)}});
  CHECK(linear->weight.eq(2).all().item<bool>());
  CHECK(linear->bias.eq(3).all().item<bool>());
  CHECK(linear->weight.scalar_type() == at::kFloat);
  CHECK(linear->weight.requires_grad());
}

TEST_CASE("the shards of an index are one checkpoint", "[safetensors]") {
  const TemporaryFolder folder;
  const Tensor a = at::arange(3), b = at::ones({2, 2}), c = at::zeros({0});
  save_safetensors(folder / "first", {{"a", a}, {"b", b}});
  save_safetensors(folder / "second", {{"c", c}});
  const auto index = write(folder / "index.json",
                           R"({"metadata": {"weight_map": 1, "x": [{"y": 2}]},
                               "weight_map": {"c": "second", "a": "first", "b": "first"}})");
  const auto tensors = load_safetensors_shards(index);
  REQUIRE(tensors.size() == 3);
  CHECK((same_bytes(tensors.at("a"), a) && same_bytes(tensors.at("b"), b) &&
         same_bytes(tensors.at("c"), c)));
}

TEST_CASE("an index that lies is refused by name", "[safetensors]") {
  const TemporaryFolder folder;
  save_safetensors(folder / "first", {{"a", at::ones({1})}});
  save_safetensors(folder / "second", {{"a", at::ones({1})}});
  std::filesystem::create_directory(folder / "folder");
  const auto index = folder / "folder" / "index.json";
  save_safetensors(folder / "folder" / "own", {{"a", at::ones({1})}, {"b", at::ones({1})}});
  write(folder / "folder" / "broken", "{}");
  const auto map_of = [](const std::string& members) {
    return R"({"weight_map": {)" + members + "}}";
  };
  const std::vector<std::pair<std::string, std::string>> refused = {
      {"", "InvalidIndex: not valid JSON"},
      {"{", "InvalidIndex: not valid JSON"},
      {"{\"weight_map\": {\"\xff\": \"own\"}}", "InvalidIndex: not valid JSON"},
      {std::string(10'000, '['), "InvalidIndex: nested too deeply"},
      {std::string(100'000'001, ' '), "InvalidIndex: more than"},
      {"[]", "InvalidIndex: has no object weight_map"},
      {R"({"metadata": {}})", "InvalidIndex: has no object weight_map"},
      {R"({"weight_map": ["a"]})", "InvalidIndex: has no object weight_map"},
      {map_of(R"("a": "own", "a": "own")"), "InvalidIndex: the key \"a\" is there twice"},
      {R"({"weight_map": {}, "weight_map": {}})", "\"weight_map\" is there twice"},
      {map_of(R"("a": 3)"), "InvalidIndex: tensor \"a\" is not in a file of this folder"},
      {map_of(R"("a": null)"), "is not in a file of this folder"},
      {map_of(R"("a": "")"), "is not in a file of this folder"},
      {map_of(R"("a": "..")"), "is not in a file of this folder"},
      {map_of(R"("a": "../first")"), "is not in a file of this folder"},
      {map_of(R"("a": "own\u0000")"), "is not in a file of this folder"},
      {map_of("\"a\": \"" + (folder / "first").string() + "\""), "is not in a file of this folder"},
      {map_of(R"("a": "first")"), "MissingShard: \"first\" does not exist"},
      {map_of(R"("a": "own")"), "ShardMismatch: \"own\" holds \"b\", which is not listed"},
      {map_of(R"("a": "own", "b": "own", "c": "own")"), "\"own\" does not hold \"c\""},
      {map_of(R"("a": "broken")"), "HeaderTooSmall"},
      {map_of(R"("a": "index.json")"), "HeaderTooLarge"},
  };
  for (const auto& [text, fault] : refused) {
    CAPTURE(text.substr(0, 100));
    write(index, text);
    CHECK_THROWS_WITH(load_safetensors_shards(index), ContainsSubstring(fault));
    CHECK_THROWS_AS(load_safetensors_shards(index), std::runtime_error);
  }
  CHECK_THROWS_WITH(load_safetensors_shards(folder / "none"), ContainsSubstring("IoError"));
  CHECK_THROWS_WITH(load_safetensors_shards(folder.path()), ContainsSubstring("IoError"));
}
