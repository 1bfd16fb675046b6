// Choice of the instruction set, once per process.
#include "kernels.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(LATENTFORGE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace latentforge {
namespace {

// Table of this library, and whether this processor runs it.
struct Choice {
  Kernels table;
  bool runs;
};

[[maybe_unused]] Kernels with_bf16(const char* name, Kernels table, const Bf16Kernels& bf16) {
  table.name = name, table.bf16 = &bf16;
  return table;
}

#if defined(LATENTFORGE_AVX2)

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#endif

#if defined(LATENTFORGE_AVX512_BF16)

bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
}

#endif

#if defined(LATENTFORGE_AMX)

// Linux saves the tiles of a process only once it has asked for them; older systems refuse.
bool has_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && d & kAmxBf16 && d & kAmxTile &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#endif

// Returns the tables of this library, the fastest first.
std::vector<Choice> choices() {
  return {
#if defined(LATENTFORGE_AMX)
      {with_bf16("amx", kAvx512, kAmx), has_amx()},
#endif
#if defined(LATENTFORGE_AVX512_BF16)
      {with_bf16("avx512_bf16", kAvx512, kAvx512Bf16), has_avx512_bf16()},
#endif
#if defined(LATENTFORGE_AVX512)
      {kAvx512, has_avx512()},
#endif
#if defined(LATENTFORGE_AVX2)
      {kAvx2, has_avx2()},
#endif
      {kPortable, true},
  };
}

// Convolution with weights in bf16 of sizes that divide nothing, and its output.
struct Trial {
  static constexpr int64_t kSide = 5, kChannels = 40, kOutputs = 24, kTaps = 9;
  std::vector<float> x = std::vector<float>(kSide * kSide * kChannels);
  std::vector<float> y = std::vector<float>(kSide * kSide * kOutputs);
  std::vector<uint16_t> weight = std::vector<uint16_t>(2 * kTaps * 2 * kGroup * kLanes);

  explicit Trial(void (*run)(const Conv&, const Parallel&)) {
    uint32_t state = 1;
    const auto random = [&] { return state = state * 1664525 + 1013904223, state >> 16; };
    for (float& value : x) value = float(random()) / 32768 - 1;
    for (uint16_t& value : weight) value = uint16_t(0x3c00 | (random() & 0x83ff));
    Conv conv{};
    conv.n = conv.stride = conv.pad_top = conv.pad_left = 1, conv.kernel = 3;
    conv.h = conv.w = conv.out_h = conv.out_w = conv.seen_h = conv.seen_w = kSide;
    conv.c = kChannels, conv.k = kOutputs, conv.weights = Weights::kBf16;
    conv.x = x.data(), conv.weight = weight.data(), conv.y = y.data();
    const auto serial = [](void*, Parallel::Body body, size_t count, void* data) {
      for (size_t index = 0; index < count; ++index) body(data, index);
    };
    run(conv, {serial, nullptr, 1});
  }
};

// Returns true if a table computes on this processor what the portable one does: most machines that
// it is compiled for were never seen by its authors.
bool agrees(const Kernels& table) {
  const Trial trial(table.bf16 ? table.bf16->conv : table.conv), portable(kPortable.conv);
  float largest = 0, error = 0;
  for (size_t i = 0; i < portable.y.size(); ++i) {
    largest = std::fmax(largest, std::fabs(portable.y[i]));
    const float difference = std::fabs(trial.y[i] - portable.y[i]);
    error = difference <= error ? error : difference;  // NaN is the largest
  }
  return error <= 1e-4f * largest;
}

std::string names_of(const std::vector<Choice>& found, bool all, const char* between) {
  std::string names;
  for (const Choice& each : found)
    if (all || each.runs) names += std::string(names.empty() ? "" : between) + each.table.name;
  return names;
}

Kernels named(const char* name, const std::vector<Choice>& found) {
  for (const Choice& each : found)
    if (each.runs && std::strcmp(name, each.table.name) == 0) return each.table;
  throw std::invalid_argument("LATENTFORGE_KERNELS is '" + std::string(name) +
                              "': unset it, or choose from those that this processor runs: " +
                              names_of(found, false, ", "));
}

Kernels select_kernels() {
  const auto found = choices();
  const char* name = std::getenv("LATENTFORGE_KERNELS");
  if (name != nullptr && *name != '\0') {
    const Kernels table = named(name, found);
    if (agrees(table)) return table;
    throw std::invalid_argument("LATENTFORGE_KERNELS is '" + std::string(name) +
                                "', whose results on this processor are wrong: unset it");
  }
  for (const Choice& each : found) {
    if (!each.runs) continue;
    if (agrees(each.table)) return each.table;
    std::fprintf(stderr,
                 "latentforge: warning: the kernels for %s give wrong results on this processor, so "
                 "slower ones take their place; please report this\n",
                 each.table.name);
  }
  return kPortable;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels selected = select_kernels();
  return selected;
}

const char* compiled_kernels() {
  static const std::string names = names_of(choices(), true, " ");
  return names.c_str();
}

const char* supported_kernels() {
  static const std::string names = names_of(choices(), false, " ");
  return names.c_str();
}

}  // namespace latentforge
