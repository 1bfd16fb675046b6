// Choice of the instruction set, once per process.
#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace latentforge {
namespace {

// Tables of this library that this processor supports, the fastest first.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#ifndef LATENTFORGE_PORTABLE
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) found.push_back(&kAvx512);
  if (avx2) found.push_back(&kAvx2);
#endif
  found.push_back(&kPortable);
  return found;
}

const Kernels& select_kernels() {
  const char* name = std::getenv("LATENTFORGE_KERNELS");
  const auto found = supported();
  if (name == nullptr || *name == '\0') return *found.front();
  std::string names;
  for (const Kernels* each : found) {
    if (std::strcmp(name, each->name) == 0) return *each;
    names += std::string(names.empty() ? "" : ", ") + each->name;
  }
  throw std::invalid_argument("LATENTFORGE_KERNELS is '" + std::string(name) +
                              "': unset it, or choose from those that this processor runs: " +
                              names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& selected = select_kernels();
  return selected;
}

}  // namespace latentforge
