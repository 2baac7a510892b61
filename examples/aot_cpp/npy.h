// NumPy's .npy files of numbers (numpy.lib.format, versions 1 to 3): little-endian, in C order.
#pragma once

#include <ATen/ATen.h>

#include <cstring>
#include <limits>
#include <regex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace npy {

inline const std::vector<std::pair<std::string, at::ScalarType>>& dtypes() {
  static const std::vector<std::pair<std::string, at::ScalarType>> known = {
      {"<f8", at::kDouble}, {"<f4", at::kFloat}, {"<f2", at::kHalf}, {"<i8", at::kLong}, {"<i4", at::kInt},
      {"<i2", at::kShort},  {"|i1", at::kChar},  {"|u1", at::kByte}, {"|b1", at::kBool}};
  return known;
}

inline constexpr char MAGIC[] = "\x93NUMPY";
inline constexpr size_t PREAMBLE = 8;  // the magic and two bytes of the version
inline constexpr size_t ALIGNMENT = 64;

inline std::runtime_error wrong(const std::string& file, const std::string& why) {
  return std::runtime_error(file + " is no .npy file that can be read: " + why);
}

// The header's text, and where the numbers begin.
inline std::pair<std::string, size_t> header_of(const std::vector<char>& bytes, const std::string& file) {
  if (bytes.size() < PREAMBLE + 4 || std::memcmp(bytes.data(), MAGIC, 6) != 0) {
    throw wrong(file, "it does not begin as one");
  }
  const size_t digits = bytes[6] == 1 ? 2 : 4;  // bytes of the header's length, which versions from 2 on have more of
  size_t length = 0;
  for (size_t i = 0; i < digits; ++i) {
    length |= static_cast<size_t>(static_cast<unsigned char>(bytes[PREAMBLE + i])) << (8 * i);
  }
  const size_t begin = PREAMBLE + digits;
  if (length > bytes.size() - begin) {
    throw wrong(file, "its header is cut short");
  }
  return {std::string(bytes.data() + begin, length), begin + length};
}

inline std::string value_of(
    const std::string& header, const std::string& key, const char* form, const std::string& file) {
  std::smatch match;
  if (!std::regex_search(header, match, std::regex("'" + key + "'\\s*:\\s*" + form))) {
    throw wrong(file, "its header has no " + key + " of numbers");
  }
  return match[1];
}

inline std::vector<int64_t> shape_of(
    const std::string& header, size_t item, size_t available, const std::string& file) {
  std::vector<int64_t> shape;
  const std::string text = value_of(header, "shape", "\\(([0-9, ]*)\\)", file);
  size_t bytes = item;
  const std::regex digits("[0-9]+");
  for (std::sregex_iterator side(text.begin(), text.end(), digits), end; side != end; ++side) {
    const std::string number = side->str();
    shape.push_back(number.size() > 18 ? std::numeric_limits<int64_t>::max() : std::stoll(number));
    if (__builtin_mul_overflow(bytes, static_cast<size_t>(shape.back()), &bytes)) {
      throw wrong(file, "its shape is too large");
    }
  }
  if (bytes != available) {
    throw wrong(
        file, "it holds " + std::to_string(available) + " bytes, and its shape asks for " + std::to_string(bytes));
  }
  return shape;
}

inline at::Tensor read(const std::vector<char>& bytes, const std::string& file) {
  const auto [header, begin] = header_of(bytes, file);
  const std::string name = value_of(header, "descr", "'([^']*)'", file);
  if (value_of(header, "fortran_order", "(True|False)", file) == "True") {
    throw wrong(file, "its numbers are in Fortran's order; save numpy.ascontiguousarray of it");
  }
  for (const auto& [known, dtype] : dtypes()) {
    if (known == name) {
      const size_t item = c10::elementSize(dtype);
      at::Tensor tensor = at::empty(shape_of(header, item, bytes.size() - begin, file), dtype);
      std::memcpy(tensor.data_ptr(), bytes.data() + begin, tensor.nbytes());
      return tensor;
    }
  }
  throw wrong(file, "its dtype " + name + " is none of a tensor's");
}

// bfloat16, which NumPy does not know, becomes float32.
inline std::vector<char> write(at::Tensor tensor) {
  tensor = (tensor.scalar_type() == at::kBFloat16 ? tensor.to(at::kFloat) : tensor).contiguous();
  std::string name;
  for (const auto& [known, dtype] : dtypes()) {
    name = dtype == tensor.scalar_type() ? known : name;
  }
  if (name.empty()) {
    throw std::runtime_error(
        std::string(".npy files hold no ") + c10::toString(tensor.scalar_type()) + "; write a .pt file");
  }
  std::string header = "{'descr': '" + name + "', 'fortran_order': False, 'shape': (";
  for (const int64_t side : tensor.sizes()) {
    header += std::to_string(side) + ", ";
  }
  header += "), }";
  header.append(ALIGNMENT - (PREAMBLE + 2 + header.size() + 1) % ALIGNMENT, ' ').push_back('\n');
  std::vector<char> bytes(MAGIC, MAGIC + 6);
  bytes.insert(bytes.end(), {1, 0, static_cast<char>(header.size() & 0xff), static_cast<char>(header.size() >> 8)});
  bytes.insert(bytes.end(), header.begin(), header.end());
  const char* numbers = static_cast<const char*>(tensor.data_ptr());
  bytes.insert(bytes.end(), numbers, numbers + tensor.nbytes());
  return bytes;
}

}  // namespace npy
