// Runs a model that was exported with torch.export and AOTInductor: no Python, only libtorch and our operators.
//
//   ./run_package OPERATORS.so MODEL.pt2 INPUTS.pt OUTPUTS.pt
//
// INPUTS.pt is a list of tensors, written by torch.save in the order of the model's arguments; OUTPUTS.pt will be a tuple
// of them. The README beside this file says how to make the others.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// Loading the library registers its operators, which a model finds by name.
void load_operators(const std::string& file) {
  // A path, for dlopen would look for a mere name where the system keeps its libraries.
  if (dlopen(std::filesystem::absolute(file).c_str(), RTLD_NOW) == nullptr) {
    throw std::runtime_error(dlerror());
  }
}

void require_file(const std::string& file) {
  if (!std::filesystem::is_regular_file(file)) {
    throw std::runtime_error(file + " is not a file");
  }
}

std::vector<at::Tensor> read_tensors(const std::string& file) {
  require_file(file);
  std::ifstream stream(file, std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (!stream) {
    throw std::runtime_error(file + " cannot be read");
  }
  const c10::IValue saved = torch::jit::pickle_load(bytes);
  const auto is_tensor = [](const c10::IValue& item) { return item.isTensor(); };
  if (!saved.isList() || !std::ranges::all_of(saved.toListRef(), is_tensor)) {
    throw std::runtime_error(file + " must hold a list of tensors");
  }
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& item : saved.toListRef()) {
    tensors.push_back(item.toTensor());
  }
  return tensors;
}

void write_tensors(const std::vector<at::Tensor>& tensors, const std::string& file) {
  // A tuple, for torch.load reads it as it reads any file of tensors; a list of tensors has a type of its own.
  const auto tuple = c10::ivalue::Tuple::create(std::vector<c10::IValue>(tensors.begin(), tensors.end()));
  const std::vector<char> pickled = torch::jit::pickle_save(tuple);
  std::ofstream stream(file, std::ios::binary);
  stream.write(pickled.data(), static_cast<std::streamsize>(pickled.size()));
  stream.close();
  if (!stream) {
    throw std::runtime_error(file + " cannot be written");
  }
}

void run(
    const std::string& operators, const std::string& package, const std::string& inputs, const std::string& outputs) {
  load_operators(operators);
  const std::vector<at::Tensor> arguments = read_tensors(inputs);
  // Unasked, a package takes inputs of other sizes than it was exported for, and reads beyond their ends.
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", /*overwrite=*/0);
  require_file(package);
  torch::inductor::AOTIModelPackageLoader model(package);
  const std::vector<at::Tensor> results = model.run(arguments);
  for (const at::Tensor& result : results) {
    std::cout << result.sizes() << ", mean " << result.mean().item<double>() << "\n";
  }
  write_tensors(results, outputs);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: " << argv[0] << " OPERATORS.so MODEL.pt2 INPUTS.pt OUTPUTS.pt\n";
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3], argv[4]);
  } catch (const c10::Error& error) {
    std::cerr << argv[0] << ": " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << argv[0] << ": " << error.what() << "\n";
    return 1;
  }
}
