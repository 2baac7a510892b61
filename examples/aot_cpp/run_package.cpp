// Runs a model that was exported with torch.export and AOTInductor: no Python, only libtorch and our operators.
//
//   run_package OPERATORS.so MODEL.pt2 INPUTS.pt OUTPUTS.pt
//
// INPUTS.pt is a list of tensors, written by torch.save in the order of the model's arguments; OUTPUTS.pt will be a tuple of them.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: " << argv[0] << " OPERATORS.so MODEL.pt2 INPUTS.pt OUTPUTS.pt\n";
    return 2;
  }
  // Loading the library registers its operators, which the model finds by name.
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[2]);

  std::ifstream file(argv[3], std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const c10::IValue saved = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> inputs;
  for (const c10::IValue& input : saved.toListRef()) {
    inputs.push_back(input.toTensor());
  }

  const std::vector<at::Tensor> outputs = model.run(inputs);
  for (const at::Tensor& output : outputs) {
    std::cout << output.sizes() << ", mean " << output.mean().item<double>() << "\n";
  }
  // A tuple, for torch.load reads it as it reads any file of tensors; a list of tensors has a type of its own.
  const auto tuple = c10::ivalue::Tuple::create(std::vector<c10::IValue>(outputs.begin(), outputs.end()));
  const std::vector<char> pickled = torch::jit::pickle_save(tuple);
  std::ofstream(argv[4], std::ios::binary).write(pickled.data(), static_cast<std::streamsize>(pickled.size()));
}
