// Runs a model that was exported with torch.export and AOTInductor: no Python, only libtorch and, where the model needs
// them, our operators. The README beside this file says how to make the files; --help says what the program takes.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "files.h"
#include "measure.h"
#include "options.h"

namespace {

enum ExitCode { WELL, FAILED, WRONG_USE, DIFFERS };

// Loading the library registers its operators, which a model finds by name.
void load_operators(const std::string& file) {
  // A path, for dlopen would look for a mere name where the system keeps its libraries.
  if (dlopen(std::filesystem::absolute(file).c_str(), RTLD_NOW) == nullptr) {
    throw std::runtime_error(dlerror());
  }
}

c10::Device device_of(const std::string& name) {
  try {
    const c10::Device device(name);
    if (device.is_cpu() || device.is_cuda()) {
      return device;
    }
  } catch (const c10::Error&) {  // said below
  }
  throw UsageError("--device takes cpu, cuda or cuda:N; got \"" + name + "\"");
}

at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known = {
      {"float64", at::kDouble}, {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}};
  if (!known.contains(name)) {
    throw UsageError("--dtype takes float64, float32, float16 or bfloat16; got \"" + name + "\"");
  }
  return known.at(name);
}

void print(const std::string& name, const std::vector<at::Tensor>& tensors, bool with_mean) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    std::cout << name << " " << i << ": " << tensors[i].sizes() << " "
              << c10::getDtypeNames(tensors[i].scalar_type()).first;
    if (with_mean) {
      std::cout << ", mean " << tensors[i].to(at::kDouble).mean().item<double>();
    }
    std::cout << "\n";
  }
}

std::vector<at::Tensor> read_inputs(const Options& options, const c10::Device& device) {
  std::vector<at::Tensor> inputs;
  for (const std::string& file : options.inputs) {
    for (const at::Tensor& tensor : read_tensors(file)) {
      const bool is_cast = !options.dtype.empty() && tensor.is_floating_point();
      inputs.push_back(tensor.to(device, is_cast ? dtype_of(options.dtype) : tensor.scalar_type()));
    }
  }
  return inputs;
}

// Whether every output is as near to its reference as was asked for, by the L2 norm of the difference.
bool compare(const std::vector<at::Tensor>& outputs, const Options& options) {
  const std::vector<at::Tensor> references = read_tensors(options.reference);
  if (references.size() != outputs.size()) {
    throw std::runtime_error(
        options.reference + " holds " + std::to_string(references.size()) + " tensors, and the model returns " +
        std::to_string(outputs.size()));
  }
  bool all_near = true;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const at::Tensor output = outputs[i].cpu().to(at::kDouble), reference = references[i].cpu().to(at::kDouble);
    if (output.sizes() != reference.sizes()) {
      std::cout << "output " << i << ": its reference is of another shape, " << reference.sizes() << "\n";
      all_near = false;
      continue;
    }
    const double length = reference.norm().item<double>();
    const double error = (output - reference).norm().item<double>() / (length > 0 ? length : 1);
    std::cout << "output " << i << ": relative error " << error << "\n";
    all_near = all_near && error <= options.tolerance;  // which no NaN is
  }
  return all_near;
}

ExitCode run(const Options& options) {
  const c10::Device device = device_of(options.device);
  for (const std::string& file : {options.output, options.reference}) {
    if (!file.empty()) {
      is_npy(file);  // before the work begins, a name that is neither is said
    }
  }
  if (!options.operators.empty()) {
    load_operators(options.operators);
  }
  const std::vector<at::Tensor> inputs = read_inputs(options, device);
  print("input", inputs, /*with_mean=*/false);
  // Unasked, a package takes inputs of other sizes than it was exported for, and reads beyond their ends.
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", /*overwrite=*/0);
  require_file(options.model);
  torch::inductor::AOTIModelPackageLoader model(options.model);
  const std::vector<at::Tensor> outputs = model.run(inputs);
  print("output", outputs, /*with_mean=*/true);
  if (options.iterations > 0) {
    const Latency latency = measure([&] { model.run(inputs); }, device, options.warmup, options.iterations);
    std::cout << "latency, ms, of " << options.iterations << " runs: mean " << latency.mean << ", std "
              << latency.deviation << ", min " << latency.least << ", max " << latency.most << "\n";
  }
  std::cout << "peak memory: " << peak_memory(device) / 1e6 << " MB\n";
  if (!options.output.empty()) {
    write_tensors(outputs, options.output);
  }
  return options.reference.empty() || compare(outputs, options) ? WELL : DIFFERS;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse(argc, argv);
    if (options.help) {
      std::cout << USAGE;
      return WELL;
    }
    return run(options);
  } catch (const UsageError& error) {
    if (*error.what() != '\0') {
      std::cerr << argv[0] << ": " << error.what() << "\n";
    }
    std::cerr << "run_package --help says how it is used\n";
    return WRONG_USE;
  } catch (const c10::Error& error) {
    std::cerr << argv[0] << ": " << error.what_without_backtrace() << "\n";
  } catch (const std::exception& error) {
    std::cerr << argv[0] << ": " << error.what() << "\n";
  }
  return FAILED;
}
