// Tensors in files: .npy, and what torch.save writes.
#pragma once

#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "npy.h"

inline void require_file(const std::string& file) {
  if (!std::filesystem::is_regular_file(file)) {
    throw std::runtime_error(file + " is not a file");
  }
}

// Whether a name is that of a .npy file, and not of a .pt file.
inline bool is_npy(const std::string& file) {
  const std::string ending = std::filesystem::path(file).extension();
  if (ending != ".npy" && ending != ".pt") {
    throw std::runtime_error("the name of a file of tensors ends in .npy or .pt; got " + file);
  }
  return ending == ".npy";
}

inline std::vector<char> read_bytes(const std::string& file) {
  require_file(file);
  std::ifstream stream(file, std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (!stream) {
    throw std::runtime_error(file + " cannot be read");
  }
  return bytes;
}

inline std::vector<at::Tensor> unpickled(const std::vector<char>& bytes, const std::string& file) {
  c10::IValue saved;
  try {
    saved = torch::jit::pickle_load(bytes);
  } catch (const c10::Error& error) {
    throw std::runtime_error(file + " is no file of tensors from torch.save: " + error.what_without_backtrace());
  }
  if (saved.isTensor()) {
    return {saved.toTensor()};
  }
  std::vector<c10::IValue> items;
  if (saved.isTuple()) {
    items = saved.toTupleRef().elements();
  } else if (saved.isList()) {
    items = saved.toListRef().vec();
  }
  const auto is_tensor = [](const c10::IValue& item) { return item.isTensor(); };
  if (items.empty() || !std::ranges::all_of(items, is_tensor)) {
    throw std::runtime_error(file + " must hold a tensor or a list of tensors");
  }
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& item : items) {
    tensors.push_back(item.toTensor());
  }
  return tensors;
}

inline std::vector<at::Tensor> read_tensors(const std::string& file) {
  const bool of_numpy = is_npy(file);
  const std::vector<char> bytes = read_bytes(file);
  return of_numpy ? std::vector{npy::read(bytes, file)} : unpickled(bytes, file);
}

inline void write_tensors(std::vector<at::Tensor> tensors, const std::string& file) {
  const bool of_numpy = is_npy(file);
  if (of_numpy && tensors.size() != 1) {
    throw std::runtime_error(
        "a .npy file holds one tensor, and the model returns " + std::to_string(tensors.size()) + "; name a .pt file");
  }
  for (at::Tensor& tensor : tensors) {
    tensor = tensor.cpu();
  }
  // A tuple, for torch.load reads it as it reads any file of tensors; a list of tensors has a type of its own.
  const std::vector<char> bytes = of_numpy
      ? npy::write(tensors[0])
      : torch::jit::pickle_save(c10::ivalue::Tuple::create(std::vector<c10::IValue>(tensors.begin(), tensors.end())));
  std::ofstream stream(file, std::ios::binary);
  stream.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  stream.close();
  if (!stream) {
    throw std::runtime_error(file + " cannot be written");
  }
}
