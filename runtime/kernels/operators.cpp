// Custom operators of the domain `latentforge` for ONNX Runtime; docs/kernels.md describes them.
//
// Compiled by compiler.py beside this file. Loaded by ONNX Runtime, to which
// runtime/backends/onnxruntime.py passes the library's path: it calls RegisterCustomOps() below.

#include <array>
#include <exception>
#include <iterator>
#include <new>
#include <string>
#include <vector>

#include "checks.h"
#include "host.h"
#include "kernels.h"
#include "ort.h"

namespace latentforge {
namespace {

// Turns exceptions into a status, since they must not propagate into C code.
template <typename Work>
OrtStatus* guarded(Work work) {
  try {
    work();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return ort::create_status(*api, ort::kFail, "Failed to allocate memory");
  } catch (const std::exception& error) {
    return ort::create_status(*api, ort::kInvalidArgument, error.what());
  }
}

// Creates an operator; a refusal names its node, as ONNX Runtime does in those of a run.
template <typename Operator>
Operator* create(const OrtKernelInfo* info) {
  try {
    return new Operator(Attributes(Operator::kChecks, info));
  } catch (const std::invalid_argument& refusal) {
    throw std::invalid_argument("Node '" + node_name(info) + "': " + refusal.what());
  }
}

constexpr int64_t blocks_of(int64_t channels) { return (channels + kLanes - 1) / kLanes; }

constexpr Weights weights_of(int type) {
  return type == ort::kHalf ? Weights::kHalf : type == ort::kBf16 ? Weights::kBf16 : Weights::kFloat;
}

// Returns the shape of packed weights: see kernels.h.
Shape packed_shape(const Conv& conv) {
  const int64_t blocks = blocks_of(conv.k), pairs = (conv.c + kGroup - 1) / kGroup * (kGroup / 2);
  if (conv.weights == Weights::kBf16) return {blocks, conv.kernel, conv.kernel, pairs, 2 * kLanes};
  return {blocks, conv.c, conv.kernel, conv.kernel, kLanes};
}

struct ConvOperator {
  static constexpr Checks kChecks{"Conv"};
  static constexpr Input kInputs[] = {
      {"x", Input::kFloats, true},       {"weight", Input::kWeights, true},
      {"bias", Input::kFloats, false},   {"scale", Input::kFloats, false},
      {"shift", Input::kFloats, false},  {"row", Input::kFloats, false},
      {"residual", Input::kFloats, false}, {"size", Input::kSizes, false}};
  static constexpr size_t kOutputs = 1;
  enum Index { kX, kWeight, kBias, kScale, kShift, kRow, kResidual, kSize };

  static constexpr int64_t kMaxGrowth = 16;
  int64_t channels, stride, upsample, silu;
  std::array<int64_t, 4> pads;

  explicit ConvOperator(const Attributes& attributes)
      : channels(attributes.integer("channels", 1, kMaxSide)),
        stride(attributes.integer("stride", 1, 2)),
        upsample(attributes.integer("upsample", 1, 2)),
        silu(attributes.integer("silu", 0, 1)),
        pads(attributes.four("pads", 2)) {
    attributes.none_of({"auto_pad", "dilations", "group", "kernel_shape", "strides"});
  }

  void compute(const Run& run) const {
    Conv conv = describe(run);
    const Shape shape = {conv.n, conv.out_h, conv.out_w, conv.k}, affine = {conv.n, conv.c};
    const Tensor bias = run.shaped(kBias, {conv.k});
    const Tensor scale = run.shaped(kScale, affine), shift = run.shaped(kShift, affine);
    if (bool(scale) != bool(shift)) (scale ? shift : scale).refuse("scale and shift together", "none");
    if (silu && !scale) scale.refuse("scale and shift with silu", "none");
    const Tensor row = run.shaped(kRow, {kAny, conv.k});
    if (row && row.shape[0] != 1) row.expect({conv.n, conv.k});
    const Tensor residual = run.shaped(kResidual, shape);
    conv.bias = bias.floats();
    conv.scale = scale.floats();
    conv.shift = shift.floats();
    conv.row = row.floats();
    conv.row_stride = row && row.shape[0] > 1 ? conv.k : 0;
    conv.residual = residual.floats();
    conv.y = run.output(0, shape);
    if (conv.n > 0) run_conv(kernels(), conv, run.parallel());
  }

  Conv describe(const Run& run) const {
    const Tensor x = run.shaped(kX, {kAny, kSome, kSome, kSome}), weight = run.ranked(kWeight, 0);
    const bool single = weight.shape.size() == 5 && weight.shape[2] == 1;
    Conv conv{};
    conv.n = x.shape[0], conv.h = x.shape[1], conv.w = x.shape[2], conv.c = x.shape[3];
    conv.k = channels, conv.kernel = single ? 1 : 3, conv.stride = stride;
    conv.weights = weights_of(weight.type);
    weight.expect(packed_shape(conv));
    enlarge(conv, run.shaped(kSize, {4}));
    for (const int64_t pad : pads) kChecks.integer("pads", pad, 0, conv.kernel - 1);
    conv.pad_top = pads[0], conv.pad_left = pads[1], conv.silu = silu != 0;
    conv.out_h = outputs(x, conv.seen_h + pads[0] + pads[2], conv.kernel);
    conv.out_w = outputs(x, conv.seen_w + pads[1] + pads[3], conv.kernel);
    conv.x = x.floats();
    conv.weight = weight.data;
    check_limits(kChecks, conv);
    return conv;
  }

  // Sets the size of the image that the convolution sees: that of the size input, or upsample times
  // the input's.
  void enlarge(Conv& conv, const Tensor& size) const {
    conv.seen_h = conv.h * upsample, conv.seen_w = conv.w * upsample;
    if (!size) return;
    if (upsample != 1) size.refuse("none, since upsample is 2", size.text());
    const int64_t* sides = static_cast<const int64_t*>(size.data);
    const bool fits = sides[0] == conv.n && sides[3] == conv.c && sides[1] >= conv.h &&
                      sides[2] >= conv.w && sides[1] <= kMaxGrowth * conv.h &&
                      sides[2] <= kMaxGrowth * conv.w;
    if (!fits)
      size.refuse(text_of({conv.n, conv.h, conv.w, conv.c}) + " or sides up to 16 times these",
                  text_of(Shape(sides, sides + 4)));
    conv.seen_h = sides[1], conv.seen_w = sides[2];
  }

  int64_t outputs(const Tensor& x, int64_t padded, int64_t kernel) const {
    if (padded < kernel) x.refuse("padded sides of at least " + std::to_string(kernel), x.text());
    return (padded - kernel) / stride + 1;
  }
};

// Inputs and attributes that both operators of group normalization take.
struct GroupNormBase {
  static constexpr Input kInputs[] = {{"x", Input::kFloats, true},
                                      {"gamma", Input::kFloats, true},
                                      {"beta", Input::kFloats, true}};
  int64_t groups;
  float epsilon;

  explicit GroupNormBase(const Attributes& attributes)
      : groups(attributes.integer("groups", 1, kMaxSide)), epsilon(attributes.positive("epsilon")) {}

  // Describes the normalization of x, with its shape: [n, ..., channels].
  GroupNorm describe(const Run& run, Shape& shape) const {
    const Tensor x = run.ranked(0, 3);
    shape = Shape(x.shape.size(), kSome), shape.front() = kAny;
    x.expect(shape);
    shape = x.shape;
    GroupNorm norm{};
    norm.n = shape.front(), norm.c = shape.back(), norm.pixels = 1;
    for (size_t i = 1; i + 1 < shape.size(); ++i) norm.pixels *= shape[i];
    if (norm.c % groups != 0)
      x.refuse("channels that " + std::to_string(groups) + " groups divide", x.text());
    const Tensor gamma = run.shaped(1, {norm.c}), beta = run.shaped(2, {norm.c});
    norm.groups = groups, norm.epsilon = epsilon;
    norm.x = x.floats(), norm.gamma = gamma.floats(), norm.beta = beta.floats();
    return norm;
  }
};

struct GroupScaleOperator : GroupNormBase {
  static constexpr Checks kChecks{"GroupScale"};
  static constexpr size_t kOutputs = 2;
  using GroupNormBase::GroupNormBase;

  void compute(const Run& run) const {
    Shape shape;
    GroupNorm norm = describe(run, shape);
    norm.scale = run.output(0, {norm.n, norm.c});
    norm.shift = run.output(1, {norm.n, norm.c});
    if (norm.n > 0) kernels().group_scale(norm, run.parallel());
  }
};

struct GroupNormOperator : GroupNormBase {
  static constexpr Checks kChecks{"GroupNorm"};
  static constexpr size_t kOutputs = 1;
  int64_t silu;

  explicit GroupNormOperator(const Attributes& attributes)
      : GroupNormBase(attributes), silu(attributes.integer("silu", 0, 1)) {}

  void compute(const Run& run) const {
    Shape shape;
    GroupNorm norm = describe(run, shape);
    std::vector<float> both(size_t(2 * norm.n * norm.c));
    norm.scale = both.data(), norm.shift = both.data() + norm.n * norm.c, norm.silu = silu != 0;
    norm.y = run.output(0, shape);
    if (norm.n > 0) kernels().group_norm(norm, run.parallel());
  }
};

struct MatMulOperator {
  static constexpr Checks kChecks{"MatMul"};
  static constexpr Input kInputs[] = {{"x", Input::kFloats, true},
                                      {"weight", Input::kWeights, true},
                                      {"bias", Input::kFloats, false},
                                      {"residual", Input::kFloats, false}};
  static constexpr size_t kOutputs = 1;
  int64_t channels, gated;

  explicit MatMulOperator(const Attributes& attributes)
      : channels(attributes.integer("channels", 1, kMaxSide)),
        gated(attributes.integer_or_0("gated", 0, 1)) {
    if (gated && channels % kPair != 0)
      kChecks.refuse("attribute channels", "a multiple of 32, in pairs of 16, if gated",
                     std::to_string(channels));
  }

  void compute(const Run& run) const {
    const Tensor x = run.ranked(0, 1);
    Conv conv = describe(x, run.ranked(1, 0));
    Shape shape = x.shape;
    shape.back() = gated ? channels / 2 : channels;
    const Tensor bias = run.shaped(2, {channels}), residual = run.shaped(3, shape);
    if (gated && residual) residual.refuse("none, since the product is gated", residual.text());
    conv.bias = bias.floats(), conv.residual = residual.floats();
    conv.y = run.output(0, shape);
    if (conv.w > 0) run_conv(kernels(), conv, run.parallel());
  }

  Conv describe(const Tensor& x, const Tensor& weight) const {
    Conv conv{};
    conv.n = conv.h = conv.seen_h = conv.out_h = conv.kernel = conv.stride = 1;
    conv.c = x.shape.back(), conv.k = channels, conv.w = 1;
    if (conv.c == 0) x.refuse("1 or more channels", x.text());
    conv.weights = weights_of(weight.type);
    weight.expect(packed_shape(conv));
    for (size_t i = 0; i + 1 < x.shape.size(); ++i) conv.w *= x.shape[i];
    conv.out_w = conv.seen_w = conv.w, conv.gated = gated != 0;
    conv.x = x.floats(), conv.weight = weight.data;
    check_limits(kChecks, conv);
    return conv;
  }
};

struct AttentionOperator {
  static constexpr Checks kChecks{"Attention"};
  static constexpr Input kInputs[] = {{"query", Input::kFloats, true},
                                      {"key", Input::kFloats, true},
                                      {"value", Input::kFloats, true}};
  static constexpr size_t kOutputs = 1;
  int64_t heads;
  float scale;

  explicit AttentionOperator(const Attributes& attributes)
      : heads(attributes.integer("heads", 1, kMaxSide)), scale(attributes.finite("scale")) {}

  void compute(const Run& run) const {
    const Tensor query = run.shaped(0, {kAny, kAny, kSome});
    const Shape& q = query.shape;
    if (q[2] % heads != 0)
      query.refuse("channels that " + std::to_string(heads) + " heads divide", query.text());
    const Tensor key = run.shaped(1, {q[0], kSome, q[2]}), value = run.shaped(2, key.shape);
    Attention attention{};
    attention.n = q[0], attention.queries = q[1], attention.keys = key.shape[1];
    attention.heads = heads, attention.size = q[2] / heads;
    attention.scale = scale;
    attention.query = query.floats(), attention.key = key.floats(), attention.value = value.floats();
    check_limits(kChecks, attention);
    attention.y = run.output(0, q);
    if (q[0] * q[1] > 0) kernels().attention(attention, run.parallel());
  }
};

// Table that describes an operator to ONNX Runtime.
template <typename Operator>
struct Entry : OrtCustomOp {
  Entry() : OrtCustomOp{} {
    version = ort::kVersion;
    GetName = [](const OrtCustomOp*) { return Operator::kChecks.op; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
    GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Operator::kInputs); };
    GetOutputTypeCount = [](const OrtCustomOp*) { return Operator::kOutputs; };
    GetInputType = [](const OrtCustomOp*, size_t index) {
      const bool floats = Operator::kInputs[index].kind == Input::kFloats;
      return int(floats ? ort::kFloat : ort::kAny);
    };
    GetOutputType = [](const OrtCustomOp*, size_t) { return int(ort::kFloat); };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
      return int(Operator::kInputs[index].required ? ort::kRequired : ort::kOptional);
    };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return int(ort::kRequired); };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return int(ort::kDefault); };
    GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) {
      return 0;
    };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info,
                        void** kernel) {
      return guarded([&] { *kernel = create<Operator>(info); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return guarded([&] {
        const Run run(Operator::kChecks, Operator::kInputs, context);
        static_cast<const Operator*>(kernel)->compute(run);
      });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Operator*>(kernel); };
  }
};

const Entry<ConvOperator> kConv;
const Entry<GroupScaleOperator> kGroupScale;
const Entry<GroupNormOperator> kGroupNorm;
const Entry<MatMulOperator> kMatMul;
const Entry<AttentionOperator> kAttention;

void register_operators(OrtSessionOptions* options) {
  kernels();  // refuses an unknown instruction set before any operator runs
  static OrtCustomOpDomain* domain = [] {  // never freed: sessions refer to it
    OrtCustomOpDomain* created = nullptr;
    check(ort::create_domain(*api, "latentforge", &created));
    for (const OrtCustomOp* each : std::initializer_list<const OrtCustomOp*>{
             &kConv, &kGroupScale, &kGroupNorm, &kMatMul, &kAttention})
      check(ort::add_to_domain(*api, created, each));
    return created;
  }();
  check(ort::add_domain(*api, options, domain));
}

}  // namespace
}  // namespace latentforge

#define LATENTFORGE_EXPORT extern "C" __attribute__((visibility("default")))

LATENTFORGE_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                const OrtApiBase* base) {
  namespace lf = latentforge;
  if (lf::api == nullptr) lf::api = base->GetApi(lf::ort::kVersion);
  if (lf::api == nullptr) {  // an older library: version 1 of the API can report it
    const OrtApi* oldest = base->GetApi(1);
    return lf::ort::create_status(*oldest, lf::ort::kFail,
                                  "latentforge's operators need onnxruntime 1.18 or newer");
  }
  return lf::guarded([&] { lf::register_operators(options); });
}

// Returns the instruction set that the operators use here, such as avx512; null if
// LATENTFORGE_KERNELS names none of those that this processor runs.
LATENTFORGE_EXPORT const char* latentforge_kernels() {
  try {
    return latentforge::kernels().name;
  } catch (const std::invalid_argument&) {
    return nullptr;
  }
}

// Return the instruction sets that this library was compiled for, and those of them that this
// processor runs, the fastest first, with a space between two.
LATENTFORGE_EXPORT const char* latentforge_compiled() { return latentforge::compiled_kernels(); }
LATENTFORGE_EXPORT const char* latentforge_supported() { return latentforge::supported_kernels(); }

// Return multiply-adds per second of one thread: on registers alone, and of the matrix product
// inside Conv.
LATENTFORGE_EXPORT double latentforge_peak() { return latentforge::kernels().peak(); }
LATENTFORGE_EXPORT double latentforge_product() { return latentforge::kernels().product(); }
