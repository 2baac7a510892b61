// What the command line asks for.
#pragma once

#include <getopt.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

// Wrong use of the command line, after which the program says how it is used.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  bool help = false;
  std::string model;
  std::vector<std::string> inputs;
  std::string operators;  // a library to load first; empty: none
  std::string output;     // a file to write; empty: none
  std::string reference;  // a file to compare the outputs with; empty: none
  std::string device = "cpu";
  std::string dtype;  // what floating-point inputs are cast to; empty: they stay as they are
  double tolerance = 1e-5;
  long warmup = 3;
  long iterations = 10;
};

inline constexpr const char* USAGE =
    "usage: run_package MODEL.pt2 INPUTS... [options]\n"
    "\n"
    "Runs a model that AOTInductor compiled, without Python. INPUTS are the tensors that the model takes, in its "
    "order:\n"
    ".npy files of one each, or .pt files of one or a list.\n"
    "\n"
    "  --operators FILE   load this library of operators first\n"
    "  --output FILE      write what the model returns: .npy for one tensor, .pt for a tuple of any number\n"
    "  --compare FILE     compare the outputs with those of a .npy or .pt file\n"
    "  --tolerance X      largest relative L2 error of an output that is compared (default: 1e-5)\n"
    "  --device DEVICE    that the model was compiled for: cpu, cuda or cuda:N (default: cpu)\n"
    "  --dtype DTYPE      cast floating-point inputs: float64, float32, float16 or bfloat16\n"
    "  --warmup N         untimed runs (default: 3)\n"
    "  --iterations N     timed runs (default: 10; 0: time nothing)\n"
    "  --help             say this\n"
    "\n"
    "Exit codes: 0, all went well; 1, something failed; 2, the command line is wrong; 3, an output differs.\n";

inline long parse_count(const std::string& name, const std::string& text) {
  if (text.empty() || text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos) {
    throw UsageError(name + " takes a whole number from 0 on; got \"" + text + "\"");
  }
  return std::stol(text);
}

inline double parse_tolerance(const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(value >= 0)) {
    throw UsageError("--tolerance takes a number from 0 on; got \"" + text + "\"");
  }
  return value;
}

inline Options parse(int argc, char** argv) {
  enum Name { HELP, OPERATORS, OUTPUT, COMPARE, TOLERANCE, DEVICE, DTYPE, WARMUP, ITERATIONS };
  static const option names[] = {
      {"help", no_argument, nullptr, HELP},
      {"operators", required_argument, nullptr, OPERATORS},
      {"output", required_argument, nullptr, OUTPUT},
      {"compare", required_argument, nullptr, COMPARE},
      {"tolerance", required_argument, nullptr, TOLERANCE},
      {"device", required_argument, nullptr, DEVICE},
      {"dtype", required_argument, nullptr, DTYPE},
      {"warmup", required_argument, nullptr, WARMUP},
      {"iterations", required_argument, nullptr, ITERATIONS},
      {nullptr, 0, nullptr, 0}};
  Options options;
  for (int found; (found = getopt_long(argc, argv, "", names, nullptr)) != -1;) {
    switch (found) {
      case HELP:
        options.help = true;
        return options;
      case OPERATORS:
        options.operators = optarg;
        break;
      case OUTPUT:
        options.output = optarg;
        break;
      case COMPARE:
        options.reference = optarg;
        break;
      case TOLERANCE:
        options.tolerance = parse_tolerance(optarg);
        break;
      case DEVICE:
        options.device = optarg;
        break;
      case DTYPE:
        options.dtype = optarg;
        break;
      case WARMUP:
        options.warmup = parse_count("--warmup", optarg);
        break;
      case ITERATIONS:
        options.iterations = parse_count("--iterations", optarg);
        break;
      default:
        throw UsageError("");  // getopt has said what is wrong
    }
  }
  if (argc - optind < 2) {
    throw UsageError("a model and at least one file of inputs are needed");
  }
  options.model = argv[optind];
  options.inputs.assign(argv + optind + 1, argv + argc);
  return options;
}
