// Custom operators of the domain `latentforge` for ONNX Runtime; docs/kernels.md describes them.
//
// Compiled by compiler.py beside this file. Loaded by ONNX Runtime, to which
// runtime/backends/onnxruntime.py passes the library's path: it calls RegisterCustomOps() below.

#include <algorithm>
#include <atomic>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "ort.h"

namespace latentforge {
namespace {

const OrtApi* api = nullptr;  // of this process's ONNX Runtime

// Throws if a function of the API reported an error.
void check(OrtStatus* status) {
  if (status == nullptr) return;
  ort::release_status(*api, status);
  throw std::runtime_error("latentforge: ONNX Runtime refused a call");
}

void expect(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("latentforge: ") + what);
}

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

int64_t integer(const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  check(ort::int_attribute(*api, info, name, &value));
  return value;
}

// Returns an attribute that graphs of earlier versions lack, or 0.
int64_t optional_integer(const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  OrtStatus* missing = ort::int_attribute(*api, info, name, &value);
  if (missing == nullptr) return value;
  ort::release_status(*api, missing);
  return 0;
}

struct Tensor {
  const void* data = nullptr;
  std::vector<int64_t> shape;
  int type = 0;

  explicit operator bool() const { return data != nullptr; }
  const float* floats() const { return static_cast<const float*>(data); }
};

// Inputs and outputs of one run of an operator.
class Run {
 public:
  explicit Run(OrtKernelContext* context) : context_(context) {
    check(ort::input_count(*api, context, &count_));
  }

  // Returns an input, or an empty tensor if it was omitted.
  Tensor input(size_t index) const {
    const OrtValue* value = nullptr;
    if (index < count_) check(ort::input(*api, context_, index, &value));
    if (value == nullptr) return {};
    Tensor tensor;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(ort::tensor_shape(*api, value, &info));
    size_t rank = 0;
    check(ort::rank(*api, info, &rank));
    tensor.shape.resize(rank);
    check(ort::dimensions(*api, info, tensor.shape.data(), rank));
    check(ort::element_type(*api, info, &tensor.type));
    ort::release_shape(*api, info);
    void* data = nullptr;
    check(ort::tensor_data(*api, const_cast<OrtValue*>(value), &data));
    tensor.data = data;
    return tensor;
  }

  float* output(size_t index, const std::vector<int64_t>& shape) const {
    OrtValue* value = nullptr;
    check(ort::output(*api, context_, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    check(ort::tensor_data(*api, value, &data));
    return static_cast<float*>(data);
  }

  Parallel parallel() const {
    static const int threads = int(std::clamp(std::thread::hardware_concurrency(), 1u, 256u));
    return {run, context_, threads};
  }

 private:
  OrtKernelContext* context_;
  size_t count_ = 0;

  // A task's exception is recorded for the calling thread: ONNX Runtime's threads cannot handle it.
  struct Work {
    Parallel::Body body;
    void* data;
    std::atomic<bool> failed{false};
  };

  static void run(void* context, Parallel::Body body, size_t count, void* data) {
    if (count == 1) return body(data, 0);
    Work work{body, data};
    const auto one = [](void* pointer, size_t index) {
      Work& work = *static_cast<Work*>(pointer);
      try {
        work.body(work.data, index);
      } catch (const std::bad_alloc&) {
        work.failed = true;
      }
    };
    check(ort::parallel_for(*api, static_cast<OrtKernelContext*>(context), one, count, count, &work));
    if (work.failed) throw std::bad_alloc();
  }
};

void expect_shape(const Tensor& tensor, const std::vector<int64_t>& shape, const char* what) {
  expect(!tensor || (tensor.shape == shape && tensor.type == ort::kFloat), what);
}

struct ConvOperator {
  static constexpr const char* kName = "Conv";
  static constexpr size_t kInputs = 8, kRequiredInputs = 2, kOutputs = 1;
  enum Input { kX, kWeight, kBias, kScale, kShift, kRow, kResidual, kSize };

  static constexpr int64_t kMaxGrowth = 16;
  int64_t channels, stride, upsample, silu;
  int64_t pads[4] = {};

  explicit ConvOperator(const OrtKernelInfo* info)
      : channels(integer(info, "channels")),
        stride(integer(info, "stride")),
        upsample(integer(info, "upsample")),
        silu(integer(info, "silu")) {
    size_t count = 4;
    check(ort::ints_attribute(*api, info, "pads", pads, &count));
    expect(count == 4 && *std::min_element(pads, pads + 4) >= 0, "Conv takes four pads");
    expect((stride == 1 || stride == 2) && (upsample == 1 || upsample == 2),
           "Conv takes a stride and an upsample of 1 or 2");
  }

  void compute(const Run& run) const {
    const Tensor x = run.input(kX), weight = run.input(kWeight);
    const Tensor bias = run.input(kBias), scale = run.input(kScale), shift = run.input(kShift);
    const Tensor row = run.input(kRow), residual = run.input(kResidual);
    const Tensor size = run.input(kSize);
    Conv conv = describe(x, weight, size);
    const std::vector<int64_t> shape = {conv.n, conv.out_h, conv.out_w, conv.k};
    expect_shape(bias, {conv.k}, "Conv takes a bias of one number per channel");
    expect_shape(scale, {conv.n, conv.c}, "Conv takes a scale of one number per image and channel");
    expect_shape(shift, {conv.n, conv.c}, "Conv takes a shift of one number per image and channel");
    expect(bool(scale) == bool(shift), "Conv takes scale and shift together");
    expect(!row || row.shape == std::vector<int64_t>{1, conv.k} ||
               row.shape == std::vector<int64_t>{conv.n, conv.k},
           "Conv takes a row of one number per channel, for each image or for all");
    expect_shape(residual, shape, "Conv takes a residual of the output's shape");
    conv.bias = bias.floats();
    conv.scale = scale.floats();
    conv.shift = shift.floats();
    conv.row = row.floats();
    conv.row_stride = row && row.shape[0] > 1 ? conv.k : 0;
    conv.residual = residual.floats();
    conv.y = run.output(0, shape);
    if (conv.n * conv.out_h * conv.out_w > 0) kernels().conv(conv, run.parallel());
  }

  Conv describe(const Tensor& x, const Tensor& weight, const Tensor& size) const {
    expect(x.shape.size() == 4 && x.type == ort::kFloat, "Conv takes float images, channels last");
    const auto& w = weight.shape;
    expect(w.size() == 5 && w[2] == w[3] && (w[2] == 1 || w[2] == 3) && w[4] == kLanes &&
               w[1] == x.shape[3] && w[0] == (channels + kLanes - 1) / kLanes,
           "Conv takes weights packed as [channels / 16, input channels, 1 or 3, the same, 16]");
    expect(weight.type == ort::kFloat || weight.type == ort::kHalf,
           "Conv takes weights of float or float16");
    Conv conv{};
    conv.n = x.shape[0], conv.h = x.shape[1], conv.w = x.shape[2], conv.c = x.shape[3];
    conv.k = channels, conv.kernel = w[2], conv.stride = stride;
    enlarge(conv, size);
    conv.pad_top = pads[0], conv.pad_left = pads[1], conv.silu = silu != 0;
    conv.out_h = outputs(conv.seen_h, pads[0] + pads[2], conv.kernel);
    conv.out_w = outputs(conv.seen_w, pads[1] + pads[3], conv.kernel);
    conv.half = weight.type == ort::kHalf;
    conv.x = x.floats();
    conv.weight = weight.data;
    return conv;
  }

  // Sets the size of the image that the convolution sees: that of the size input, or upsample times
  // the input's.
  void enlarge(Conv& conv, const Tensor& size) const {
    conv.seen_h = conv.h * upsample, conv.seen_w = conv.w * upsample;
    if (!size) return;
    expect(size.type == ort::kInt64 && size.shape == std::vector<int64_t>{4} && upsample == 1,
           "Conv takes a size of four int64, without upsample");
    const int64_t* sides = static_cast<const int64_t*>(size.data);
    expect(sides[0] == conv.n && sides[3] == conv.c && sides[1] >= conv.h && sides[2] >= conv.w &&
               sides[1] <= kMaxGrowth * conv.h && sides[2] <= kMaxGrowth * conv.w,
           "Conv takes a size of the input's images and channels, from its sides to 16 times these");
    conv.seen_h = sides[1], conv.seen_w = sides[2];
  }

  int64_t outputs(int64_t side, int64_t padding, int64_t kernel) const {
    return std::max<int64_t>(0, (side + padding - kernel) / stride + 1);
  }
};

struct GroupNormBase {
  static constexpr size_t kInputs = 3, kRequiredInputs = 3;
  int64_t groups;
  float epsilon = 0;

  explicit GroupNormBase(const OrtKernelInfo* info) : groups(integer(info, "groups")) {
    check(ort::float_attribute(*api, info, "epsilon", &epsilon));
    expect(groups > 0, "group normalization takes a number of groups");
  }

  GroupNorm describe(const Run& run, std::vector<int64_t>& shape) const {
    const Tensor x = run.input(0), gamma = run.input(1), beta = run.input(2);
    expect(x.shape.size() >= 3 && x.type == ort::kFloat,
           "group normalization takes floats of [n, ..., channels]");
    shape = x.shape;
    GroupNorm norm{};
    norm.n = shape.front(), norm.c = shape.back(), norm.pixels = 1;
    for (size_t i = 1; i + 1 < shape.size(); ++i) norm.pixels *= shape[i];
    expect_shape(gamma, {norm.c}, "group normalization takes a gamma of one number per channel");
    expect_shape(beta, {norm.c}, "group normalization takes a beta of one number per channel");
    expect(norm.c % groups == 0, "group normalization takes channels that groups divide");
    norm.groups = groups, norm.epsilon = epsilon;
    norm.x = x.floats(), norm.gamma = gamma.floats(), norm.beta = beta.floats();
    return norm;
  }
};

struct GroupScaleOperator : GroupNormBase {
  static constexpr const char* kName = "GroupScale";
  static constexpr size_t kOutputs = 2;
  using GroupNormBase::GroupNormBase;

  void compute(const Run& run) const {
    std::vector<int64_t> shape;
    GroupNorm norm = describe(run, shape);
    norm.scale = run.output(0, {norm.n, norm.c});
    norm.shift = run.output(1, {norm.n, norm.c});
    kernels().group_scale(norm, run.parallel());
  }
};

struct GroupNormOperator : GroupNormBase {
  static constexpr const char* kName = "GroupNorm";
  static constexpr size_t kOutputs = 1;
  int64_t silu;

  explicit GroupNormOperator(const OrtKernelInfo* info)
      : GroupNormBase(info), silu(integer(info, "silu")) {}

  void compute(const Run& run) const {
    std::vector<int64_t> shape;
    GroupNorm norm = describe(run, shape);
    std::vector<float> both(size_t(2 * norm.n * norm.c));
    norm.scale = both.data(), norm.shift = both.data() + norm.n * norm.c, norm.silu = silu != 0;
    norm.y = run.output(0, shape);
    kernels().group_norm(norm, run.parallel());
  }
};

struct MatMulOperator {
  static constexpr const char* kName = "MatMul";
  static constexpr size_t kInputs = 4, kRequiredInputs = 2, kOutputs = 1;
  int64_t channels, gated;

  explicit MatMulOperator(const OrtKernelInfo* info)
      : channels(integer(info, "channels")), gated(optional_integer(info, "gated")) {
    expect(!gated || channels % kPair == 0, "a gated MatMul takes channels in pairs of 16");
  }

  void compute(const Run& run) const {
    const Tensor x = run.input(0), weight = run.input(1), bias = run.input(2),
                 residual = run.input(3);
    Conv conv = describe(x, weight);
    std::vector<int64_t> shape = x.shape;
    shape.back() = gated ? channels / 2 : channels;
    expect_shape(bias, {channels}, "MatMul takes a bias of one number per channel");
    expect_shape(residual, shape, "MatMul takes a residual of the output's shape");
    expect(!gated || !residual, "a gated MatMul takes no residual");
    conv.bias = bias.floats(), conv.residual = residual.floats();
    conv.y = run.output(0, shape);
    if (conv.w > 0) kernels().conv(conv, run.parallel());
  }

  Conv describe(const Tensor& x, const Tensor& weight) const {
    expect(!x.shape.empty() && x.type == ort::kFloat, "MatMul takes floats of [..., channels]");
    Conv conv{};
    conv.n = conv.h = conv.seen_h = conv.out_h = conv.kernel = conv.stride = 1;
    conv.c = x.shape.back(), conv.k = channels, conv.w = 1;
    expect(weight.shape == std::vector<int64_t>{(channels + kLanes - 1) / kLanes, conv.c, 1, 1,
                                                kLanes},
           "MatMul takes weights packed as [channels / 16, input channels, 1, 1, 16]");
    expect(weight.type == ort::kFloat || weight.type == ort::kHalf,
           "MatMul takes weights of float or float16");
    for (size_t i = 0; i + 1 < x.shape.size(); ++i) conv.w *= x.shape[i];
    conv.out_w = conv.seen_w = conv.w, conv.half = weight.type == ort::kHalf, conv.gated = gated != 0;
    conv.x = x.floats(), conv.weight = weight.data;
    return conv;
  }
};

struct AttentionOperator {
  static constexpr const char* kName = "Attention";
  static constexpr size_t kInputs = 3, kRequiredInputs = 3, kOutputs = 1;
  int64_t heads;
  float scale = 0;

  explicit AttentionOperator(const OrtKernelInfo* info) : heads(integer(info, "heads")) {
    check(ort::float_attribute(*api, info, "scale", &scale));
    expect(heads > 0, "Attention takes a number of heads");
  }

  void compute(const Run& run) const {
    const Tensor query = run.input(0), key = run.input(1), value = run.input(2);
    for (const Tensor* each : {&query, &key, &value})
      expect(each->shape.size() == 3 && each->type == ort::kFloat,
             "Attention takes floats of [n, tokens, channels]");
    const auto &q = query.shape, &k = key.shape;
    expect(k == value.shape && q[0] == k[0] && q[2] == k[2] && q[2] % heads == 0 && k[1] > 0,
           "Attention takes keys and values alike, and channels that heads divide");
    Attention attention{};
    attention.n = q[0], attention.queries = q[1], attention.keys = k[1];
    attention.heads = heads, attention.size = q[2] / heads;
    attention.scale = scale;
    attention.query = query.floats(), attention.key = key.floats(), attention.value = value.floats();
    attention.y = run.output(0, q);
    if (q[0] * q[1] > 0) kernels().attention(attention, run.parallel());
  }
};

// Table that describes an operator to ONNX Runtime.
template <typename Operator>
struct Entry : OrtCustomOp {
  Entry() : OrtCustomOp{} {
    version = ort::kVersion;
    GetName = [](const OrtCustomOp*) { return Operator::kName; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
    GetInputTypeCount = [](const OrtCustomOp*) { return Operator::kInputs; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return Operator::kOutputs; };
    GetInputType = [](const OrtCustomOp*, size_t index) {
      const bool weight = index == 1 && Operator::kInputs > 3, size = index == 7;
      return int(weight || size ? ort::kAny : ort::kFloat);
    };
    GetOutputType = [](const OrtCustomOp*, size_t) { return int(ort::kFloat); };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
      return int(index < Operator::kRequiredInputs ? ort::kRequired : ort::kOptional);
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
      return guarded([&] { *kernel = new Operator(info); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return guarded([&] { static_cast<const Operator*>(kernel)->compute(Run(context)); });
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

// Returns the instruction set that the operators use here: avx512, avx2 or portable.
LATENTFORGE_EXPORT const char* latentforge_kernels() { return latentforge::kernels().name; }

// Return multiply-adds per second of one thread: on registers alone, and of the matrix product
// inside Conv.
LATENTFORGE_EXPORT double latentforge_peak() { return latentforge::kernels().peak(); }
LATENTFORGE_EXPORT double latentforge_product() { return latentforge::kernels().product(); }
