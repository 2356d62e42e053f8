#include <ATen/Functions.h>
#include <fcntl.h>
#include <mamba_ssm/io/safetensors.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <torch/utils.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <system_error>
#include <utility>
#include <vector>

namespace mamba_ssm {
namespace {

using at::Tensor;

constexpr uint64_t kLengthSize = 8;               // the header's length, in front of it
constexpr uint64_t kMaxHeaderSize = 100'000'000;  // bytes; the limit of the reference reader
constexpr uint64_t kMaxNameSize = 4096;           // bytes
constexpr size_t kMaxRank = 64;                   // ATen keeps sets of dimensions in 64 bits
constexpr char kMetadataKey[] = "__metadata__";

struct NamedDtype {
  const char* name;
  at::ScalarType dtype;
};

constexpr NamedDtype kDtypes[] = {
    {"BOOL", at::kBool},
    {"U8", at::kByte},
    {"I8", at::kChar},
    {"F8_E5M2", at::kFloat8_e5m2},
    {"F8_E4M3", at::kFloat8_e4m3fn},
    {"F8_E8M0", at::kFloat8_e8m0fnu},
    {"I16", at::kShort},
    {"U16", at::kUInt16},
    {"F16", at::kHalf},
    {"BF16", at::kBFloat16},
    {"I32", at::kInt},
    {"U32", at::kUInt32},
    {"F32", at::kFloat},
    {"I64", at::kLong},
    {"U64", at::kUInt64},
    {"F64", at::kDouble},
    {"C64", at::kComplexFloat},
};

/// A name or value out of a file, for an error message: quoted, short, without control characters.
std::string quoted(const std::string& text) {
  constexpr size_t kMaxLength = 80;
  size_t length = std::min(text.size(), kMaxLength);
  while (length < text.size() && length > 0 && (text[length] & 0xc0) == 0x80) --length;  // UTF-8
  std::string result = "\"";
  for (size_t i = 0; i < length; ++i) {
    result += static_cast<unsigned char>(text[i]) < 0x20 ? '?' : text[i];
  }
  return result + (length < text.size() ? "...\"" : "\"");
}

/// What is wrong with a file, without the file's name.
class Fault : public std::runtime_error {
 public:
  template <class... Parts>
  explicit Fault(const char* kind, const Parts&... parts)
      : std::runtime_error(join(kind, ": ", parts...)) {}

  static Fault io(const char* what) {
    return Fault("IoError", what, ": ", std::generic_category().message(errno));
  }

 private:
  template <class... Parts>
  static std::string join(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return text.str();
  }
};

void check_name(const std::string& name) {
  if (name.empty()) throw Fault("InvalidHeaderDeserialization", "a tensor name is empty");
  if (name.size() > kMaxNameSize) {
    throw Fault("InvalidHeaderDeserialization", "tensor name ", quoted(name), " has ", name.size(),
                " bytes, more than ", kMaxNameSize);
  }
  if (std::any_of(name.begin(), name.end(),
                  [](char c) { return static_cast<unsigned char>(c) < 0x20; })) {
    throw Fault("InvalidHeaderDeserialization", "tensor name ", quoted(name),
                " has a control character");
  }
}

struct TensorInfo {
  std::optional<at::ScalarType> dtype;
  std::optional<std::vector<int64_t>> shape;
  std::optional<std::vector<uint64_t>> data_offsets;  // [begin, end)

  uint64_t begin() const { return (*data_offsets)[0]; }
  uint64_t end() const { return (*data_offsets)[1]; }
};

struct Header {
  std::map<std::string, TensorInfo> tensors;
  std::map<std::string, std::string> metadata;
};

/// Receives the JSON of a header event by event and accepts the one form that a header has. Nothing
/// else is ever stored, however large or deep.
class HeaderParser : public nlohmann::json_sax<nlohmann::json> {
 public:
  static Header parse(const char* begin, const char* end) {
    // The JSON library takes NUL for the end of its input.
    if (const char* nul = std::find(begin, end, '\0'); nul != end) {
      throw Fault("InvalidHeaderDeserialization", "NUL at byte ", nul - begin, " of the header");
    }
    HeaderParser parser;
    nlohmann::json::sax_parse(begin, end, &parser);
    return std::move(parser.header_);
  }

  bool start_object(size_t) override {
    switch (place_) {
      case Place::kStart:
        place_ = Place::kTop;
        return true;
      case Place::kTopValue:
        place_ = key_ == kMetadataKey ? Place::kMetadata : Place::kTensor;
        if (place_ == Place::kTensor) {
          check_name(key_);
          const auto [entry, is_new] = header_.tensors.try_emplace(key_);
          if (!is_new) unexpected("a second tensor of that name");
          tensor_ = &entry->second;
        } else if (std::exchange(has_metadata_, true)) {
          unexpected("a second __metadata__");
        }
        return true;
      default:
        unexpected("an object");
    }
  }

  bool key(std::string& key) override {
    (place_ == Place::kTop ? key_ : field_) = std::move(key);
    switch (place_) {
      case Place::kTop:
        place_ = Place::kTopValue;
        return true;
      case Place::kMetadata:
        place_ = Place::kMetadataValue;
        return true;
      default:
        place_ = Place::kField;
        return true;
    }
  }

  bool end_object() override {
    if (place_ == Place::kTensor) {
      for (const auto& [field, present] :
           {std::pair("dtype", tensor_->dtype.has_value()),
            std::pair("shape", tensor_->shape.has_value()),
            std::pair("data_offsets", bool(tensor_->data_offsets))}) {
        if (!present) {
          throw Fault("InvalidHeaderDeserialization", "tensor ", quoted(key_), " has no ", field);
        }
      }
      if (tensor_->data_offsets->size() != 2) {
        throw Fault("InvalidHeaderDeserialization", "tensor ", quoted(key_),
                    ": data_offsets must be two numbers, got ", tensor_->data_offsets->size());
      }
    }
    place_ = Place::kTop;
    return true;
  }

  bool start_array(size_t) override {
    if (place_ != Place::kField) unexpected("an array");
    if (field_ == "shape" && !tensor_->shape) {
      tensor_->shape.emplace();
      place_ = Place::kShape;
    } else if (field_ == "data_offsets" && !tensor_->data_offsets) {
      tensor_->data_offsets.emplace();
      place_ = Place::kOffsets;
    } else {
      unexpected("an array");
    }
    return true;
  }

  bool end_array() override {
    place_ = Place::kTensor;
    return true;
  }

  bool number_unsigned(number_unsigned_t value) override {
    if (place_ == Place::kShape) {
      if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        throw Fault("ValidationOverflow", "tensor ", quoted(key_), " has a dimension of ", value);
      }
      if (tensor_->shape->size() == kMaxRank) {
        throw Fault("TensorInvalidInfo", "tensor ", quoted(key_), " has more than ", kMaxRank,
                    " dimensions");
      }
      tensor_->shape->push_back(static_cast<int64_t>(value));
    } else if (place_ == Place::kOffsets && tensor_->data_offsets->size() < 3) {
      tensor_->data_offsets->push_back(value);
    } else {
      unexpected("a number");
    }
    return true;
  }

  bool string(std::string& value) override {
    if (place_ == Place::kMetadataValue) {
      if (!header_.metadata.try_emplace(field_, std::move(value)).second) {
        unexpected("a second value");
      }
      place_ = Place::kMetadata;
    } else if (place_ == Place::kField && field_ == "dtype" && !tensor_->dtype) {
      const auto* known = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                       [&](const NamedDtype& d) { return value == d.name; });
      if (known == std::end(kDtypes)) {
        throw Fault("InvalidHeaderDeserialization", "tensor ", quoted(key_), " has unknown dtype ",
                    quoted(value));
      }
      tensor_->dtype = known->dtype;
      place_ = Place::kTensor;
    } else {
      unexpected("a string");
    }
    return true;
  }

  bool number_integer(number_integer_t) override { unexpected("a negative number"); }
  bool number_float(number_float_t, const string_t&) override {
    unexpected("a number that is no integer of 64 bits");
  }
  bool boolean(bool) override { unexpected("true or false"); }
  bool null() override { unexpected("null"); }
  bool binary(binary_t&) override { unexpected("binary data"); }

  bool parse_error(size_t position, const std::string&, const nlohmann::json::exception&) override {
    throw Fault("InvalidHeaderDeserialization", "not JSON in UTF-8 at byte ", position,
                " of the header");
  }

 private:
  enum class Place {
    kStart,
    kTop,            // in the header, before a name
    kTopValue,       // after a name
    kMetadata,       // in __metadata__, before a key
    kMetadataValue,  // after a key
    kTensor,         // in a tensor's object, before a field
    kField,          // after a field's name
    kShape,          // in the list of that field
    kOffsets,
  };

  [[noreturn]] void unexpected(const char* what) const {
    std::string where = "the header";
    if (place_ != Place::kStart && place_ != Place::kTop) where = quoted(key_);
    if (place_ == Place::kField || place_ == Place::kShape || place_ == Place::kOffsets ||
        place_ == Place::kMetadataValue) {
      where += ", " + quoted(field_);
    }
    throw Fault("InvalidHeaderDeserialization", "unexpected ", what, " at ", where);
  }

  Place place_ = Place::kStart;
  bool has_metadata_ = false;
  std::string key_;    // of the header: a tensor's name or __metadata__
  std::string field_;  // inside that
  TensorInfo* tensor_ = nullptr;
  Header header_;
};

/// Checks that the tensors tile [0, data_size): in the order of their offsets, each begins where
/// the one before ends, is as long as dtype and shape say, and the last one ends at data_size.
void validate(const Header& header, uint64_t data_size) {
  using Entry = const std::pair<const std::string, TensorInfo>*;
  std::vector<Entry> entries;
  for (const auto& entry : header.tensors) entries.push_back(&entry);
  std::sort(entries.begin(), entries.end(),
            [](Entry a, Entry b) { return *a->second.data_offsets < *b->second.data_offsets; });

  uint64_t expected = 0;
  for (const Entry entry : entries) {
    const auto& [name, info] = *entry;
    if (info.begin() != expected || info.end() < info.begin()) {
      throw Fault("InvalidOffset", "tensor ", quoted(name), " has data_offsets [", info.begin(),
                  ", ", info.end(), "), but must begin at ", expected,
                  ", where the tensor before it ends");
    }
    // Empty tensors too: torch multiplies the other dimensions for the strides.
    int64_t size = static_cast<int64_t>(c10::elementSize(*info.dtype));
    bool empty = false;
    for (const int64_t extent : *info.shape) {
      empty = empty || extent == 0;
      if (__builtin_mul_overflow(size, std::max<int64_t>(extent, 1), &size)) {
        throw Fault("ValidationOverflow", "the size of tensor ", quoted(name), " exceeds 64 bits");
      }
    }
    if (empty) size = 0;
    if (info.end() - info.begin() != static_cast<uint64_t>(size)) {
      throw Fault("TensorInvalidInfo", "tensor ", quoted(name), " has ", info.end() - info.begin(),
                  " bytes, but its dtype and shape take ", size);
    }
    expected = info.end();
  }
  if (expected != data_size) {
    throw Fault("MetadataIncompleteBuffer", "the tensors take ", expected,
                " bytes, but the file holds ", data_size, " after the header");
  }
}

/// A file descriptor that is closed at the end.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

/// A regular file in memory. Writes into it stay private.
class Mapping {
 public:
  explicit Mapping(const std::filesystem::path& path) {
    // O_NONBLOCK: opening a FIFO must not wait for a writer.
    const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (file.get() < 0) throw Fault::io("cannot open");
    size_ = file_size(file);
    if (size_ < kLengthSize) {
      throw Fault("HeaderTooSmall", "the file has ", size_, " bytes, a header length takes ",
                  kLengthSize);
    }
    void* address =
        ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file.get(), 0);
    if (address == MAP_FAILED) throw Fault::io("cannot map");
    data_ = static_cast<char*>(address);
    if (file_size(file) != size_) {
      ::munmap(data_, size_);
      throw Fault("IoError", "the file changed its size while it was opened");
    }
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { ::munmap(data_, size_); }

  char* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  static uint64_t file_size(const Descriptor& file) {
    struct stat status;
    if (::fstat(file.get(), &status) != 0) throw Fault::io("cannot read the size");
    if (!S_ISREG(status.st_mode)) throw Fault("IoError", "not a regular file");
    return static_cast<uint64_t>(status.st_size);
  }

  char* data_;
  uint64_t size_;
};

uint64_t read_length(const char* bytes) {
  uint64_t length = 0;
  for (uint64_t i = 0; i < kLengthSize; ++i) {
    length |= static_cast<uint64_t>(static_cast<unsigned char>(bytes[i])) << (8 * i);
  }
  return length;
}

Tensor make_tensor(const TensorInfo& info, char* data, const std::shared_ptr<Mapping>& mapping) {
  if (info.begin() == info.end()) return at::empty(*info.shape, *info.dtype);
  char* const bytes = data + info.begin();
  // Any byte but 0 means true in the file; in memory only 1 does.
  if (*info.dtype == at::kBool) return at::from_blob(bytes, *info.shape, at::kByte).ne(0);
  if (reinterpret_cast<uintptr_t>(bytes) % c10::elementSize(*info.dtype) != 0) {
    Tensor copy = at::empty(*info.shape, *info.dtype);
    std::memcpy(copy.mutable_data_ptr(), bytes, info.end() - info.begin());
    return copy;
  }
  return at::from_blob(
      bytes, *info.shape, [mapping](void*) {}, at::TensorOptions(*info.dtype));
}

/// A file that takes its name when it is complete, and otherwise leaves nothing behind.
class NewFile {
 public:
  explicit NewFile(std::filesystem::path path)
      : path_(std::move(path)),
        temporary_(path_.string() + ".tmp-" + std::to_string(::getpid()) + "-" +
                   std::to_string(counter_++)),
        file_(::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)) {
    if (file_.get() < 0) throw Fault::io("cannot create");
  }
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;
  ~NewFile() {
    if (!committed_) ::unlink(temporary_.c_str());
  }

  void write(const void* data, size_t size) {
    const char* bytes = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t written = ::write(file_.get(), bytes, size);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) throw Fault::io("cannot write");
      bytes += written;
      size -= static_cast<size_t>(written);
    }
  }

  void commit() {
    if (::fsync(file_.get()) != 0) throw Fault::io("cannot write");
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) throw Fault::io("cannot rename");
    committed_ = true;
  }

 private:
  static inline std::atomic<uint64_t> counter_{0};

  std::filesystem::path path_;
  std::string temporary_;
  Descriptor file_;
  bool committed_ = false;
};

const char* dtype_name(const std::string& tensor_name, at::ScalarType dtype) {
  const auto* known = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                   [&](const NamedDtype& d) { return dtype == d.dtype; });
  if (known == std::end(kDtypes)) {
    throw Fault("InvalidTensor", "tensor ", quoted(tensor_name), " has dtype ", dtype,
                ", which the format lacks");
  }
  return known->name;
}

void write_file(const std::filesystem::path& path, const std::map<std::string, Tensor>& tensors,
                const std::map<std::string, std::string>& metadata) {
  // Wide elements first: then every tensor is aligned, as the data begins at a multiple of 8.
  using Entry = const std::pair<const std::string, Tensor>*;
  std::vector<Entry> entries;
  for (const auto& entry : tensors) {
    const auto& [name, tensor] = entry;
    check_name(name);
    if (name == kMetadataKey || !tensor.defined() || tensor.layout() != at::kStrided ||
        tensor.is_meta()) {
      throw Fault("InvalidTensor", quoted(name), " is not a dense tensor with a name of its own");
    }
    entries.push_back(&entry);
  }
  std::stable_sort(entries.begin(), entries.end(), [](Entry a, Entry b) {
    return a->second.element_size() > b->second.element_size();
  });

  nlohmann::json json = nlohmann::json::object();
  if (!metadata.empty()) json[kMetadataKey] = metadata;
  uint64_t offset = 0;
  for (const Entry entry : entries) {
    const auto& [name, tensor] = *entry;
    const uint64_t end = offset + tensor.nbytes();
    json[name] = {{"dtype", dtype_name(name, tensor.scalar_type())},
                  {"shape", std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end())},
                  {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string header;
  try {
    header = json.dump();
  } catch (const nlohmann::json::type_error&) {
    throw Fault("InvalidTensor", "names and metadata must be valid UTF-8");
  }
  header.resize((header.size() + 7) / 8 * 8, ' ');
  if (header.size() > kMaxHeaderSize) {
    throw Fault("HeaderTooLarge", "the header takes ", header.size(), " bytes, more than ",
                kMaxHeaderSize);
  }

  NewFile file(path);
  char length[kLengthSize];
  for (uint64_t i = 0; i < kLengthSize; ++i) {
    length[i] = static_cast<char>(header.size() >> (8 * i));
  }
  file.write(length, kLengthSize);
  file.write(header.data(), header.size());
  for (const Entry entry : entries) {
    const Tensor dense =
        entry->second.detach().resolve_conj().resolve_neg().to(at::kCPU).contiguous();
    file.write(dense.const_data_ptr(), dense.nbytes());
  }
  file.commit();
}

constexpr uint64_t kMaxIndexSize = 100'000'000;  // bytes
constexpr int kMaxIndexDepth = 64;               // objects and lists in one another
constexpr char kWeightMap[] = "weight_map";

/// weight_map of an index, turned round: the names of the tensors of each shard.
std::map<std::string, std::set<std::string>> read_index(const std::filesystem::path& path) {
  std::error_code error;
  const uint64_t size = std::filesystem::file_size(path, error);
  if (error || !std::filesystem::is_regular_file(path))
    throw Fault("IoError", "not a regular file");
  if (size > kMaxIndexSize) {
    throw Fault("InvalidIndex", "more than ", kMaxIndexSize, " bytes");
  }
  // Members of weight_map are kept, all others, which may be of any form, are read over.
  std::vector<std::set<std::string>> keys;  // those met in each of the objects around
  const auto keep = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    using Event = nlohmann::json::parse_event_t;
    if (depth > kMaxIndexDepth) throw Fault("InvalidIndex", "nested too deeply");
    const auto around = static_cast<size_t>(depth);  // objects and lists
    if (event == Event::object_start) {
      keys.resize(around);
      keys.emplace_back();
    }
    if (event != Event::key) return true;
    const auto& key = value.get_ref<const std::string&>();
    if (!keys[around - 1].insert(key).second) {
      throw Fault("InvalidIndex", "the key ", quoted(key), " is there twice");
    }
    return depth != 1 || key == kWeightMap;
  };
  std::ifstream file(path, std::ios::binary);
  nlohmann::json index;
  try {
    index = nlohmann::json::parse(file, keep);
  } catch (const nlohmann::json::exception&) {
    throw Fault("InvalidIndex", "not valid JSON");
  }
  if (!index.is_object() || !index.contains(kWeightMap) || !index[kWeightMap].is_object()) {
    throw Fault("InvalidIndex", "has no object weight_map");
  }
  std::map<std::string, std::set<std::string>> shards;
  for (const auto& [name, place] : index[kWeightMap].items()) {
    const std::string* shard = place.get_ptr<const std::string*>();
    const bool is_plain = shard != nullptr && !shard->empty() && *shard != "." && *shard != ".." &&
                          shard->find_first_of(std::string("/\0", 2)) == std::string::npos;
    if (!is_plain) {
      throw Fault("InvalidIndex", "tensor ", quoted(name), " is not in a file of this folder");
    }
    shards[*shard].insert(name);
  }
  return shards;
}

[[noreturn]] void rethrow(const char* function, const std::filesystem::path& path,
                          const Fault& fault) {
  throw std::runtime_error(std::string(function) + ": " + path.string() + ": " + fault.what());
}

}  // namespace

std::map<std::string, Tensor> load_safetensors(const std::filesystem::path& path,
                                               std::map<std::string, std::string>* metadata) {
  try {
    const auto mapping = std::make_shared<Mapping>(path);
    const uint64_t header_size = read_length(mapping->data());
    if (header_size > kMaxHeaderSize) {
      throw Fault("HeaderTooLarge", "the header claims ", header_size, " bytes, more than ",
                  kMaxHeaderSize);
    }
    if (header_size > mapping->size() - kLengthSize) {
      throw Fault("InvalidHeaderLength", "the header claims ", header_size,
                  " bytes, but the file has ", mapping->size() - kLengthSize);
    }
    const char* const header_begin = mapping->data() + kLengthSize;
    if (header_size == 0 || *header_begin != '{') {
      throw Fault("InvalidHeaderStart", "the header must begin with '{'");
    }
    Header header = HeaderParser::parse(header_begin, header_begin + header_size);
    validate(header, mapping->size() - kLengthSize - header_size);

    std::map<std::string, Tensor> tensors;
    char* const data = mapping->data() + kLengthSize + header_size;
    for (const auto& [name, info] : header.tensors) {
      tensors.emplace_hint(tensors.end(), name, make_tensor(info, data, mapping));
    }
    if (metadata != nullptr) *metadata = std::move(header.metadata);
    return tensors;
  } catch (const Fault& fault) {
    rethrow("load_safetensors", path, fault);
  }
}

std::map<std::string, Tensor> load_safetensors_shards(const std::filesystem::path& index) {
  try {
    std::map<std::string, Tensor> tensors;
    for (const auto& [shard, names] : read_index(index)) {
      const std::filesystem::path path = index.parent_path() / shard;
      if (!std::filesystem::exists(path))
        throw Fault("MissingShard", quoted(shard), " does not exist");
      auto held = load_safetensors(path);
      for (const auto& [name, tensor] : held) {
        if (names.count(name) == 0) {
          throw Fault("ShardMismatch", quoted(shard), " holds ", quoted(name),
                      ", which is not listed");
        }
      }
      for (const auto& name : names) {
        if (held.count(name) == 0) {
          throw Fault("ShardMismatch", quoted(shard), " does not hold ", quoted(name));
        }
      }
      tensors.merge(held);
    }
    return tensors;
  } catch (const Fault& fault) {
    rethrow("load_safetensors_shards", index, fault);
  }
}

void save_safetensors(const std::filesystem::path& path,
                      const std::map<std::string, Tensor>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  try {
    write_file(path, tensors, metadata);
  } catch (const Fault& fault) {
    rethrow("save_safetensors", path, fault);
  }
}

std::map<std::string, Tensor> state_dict(const torch::nn::Module& module) {
  std::map<std::string, Tensor> tensors;
  for (const auto& item : module.named_parameters()) tensors.emplace(item.key(), item->detach());
  for (const auto& item : module.named_buffers()) tensors.emplace(item.key(), item->detach());
  return tensors;
}

void load_state_dict(torch::nn::Module& module, const std::map<std::string, Tensor>& tensors) {
  const auto targets = state_dict(module);
  std::ostringstream problems;
  for (const auto& [name, target] : targets) {
    const auto source = tensors.find(name);
    if (source == tensors.end()) {
      problems << "\n  missing: " << quoted(name);
    } else if (source->second.sizes() != target.sizes() ||
               source->second.is_floating_point() != target.is_floating_point()) {
      problems << "\n  mismatched: " << quoted(name) << " must be " << target.scalar_type() << " "
               << target.sizes() << ", got " << source->second.scalar_type() << " "
               << source->second.sizes();
    }
  }
  for (const auto& [name, source] : tensors) {
    if (targets.count(name) == 0) problems << "\n  unexpected: " << quoted(name);
  }
  if (problems.tellp() > 0) {
    throw std::runtime_error("load_state_dict: the tensors do not fit the module:" +
                             problems.str());
  }
  const torch::NoGradGuard no_grad;
  for (const auto& [name, target] : targets) target.copy_(tensors.at(name));
}

}  // namespace mamba_ssm
