// Part of ONNX Runtime's C API that custom operators need, declared by hand.
//
// The API is a table of functions to which releases only append, so that a function is identified by
// its index. GetApi() returns null if the library is older than the requested version.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef void* OrtApi[275];

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};
}

namespace latentforge::ort {

constexpr uint32_t kVersion = 18;  // the first with all functions used here

enum ElementType { kAny = 0, kFloat = 1, kInt64 = 7, kHalf = 10, kBf16 = 16 };
enum Characteristic { kRequired = 0, kOptional = 1 };
enum MemoryType { kDefault = 0 };
enum ErrorCode { kFail = 1, kInvalidArgument = 2 };

// Function of the API table, by index and type.
template <size_t Index, typename... Arguments>
struct Function {
  OrtStatus* operator()(const OrtApi& api, Arguments... arguments) const {
    return reinterpret_cast<OrtStatus* (*)(Arguments...)>(api[Index])(arguments...);
  }
};

inline OrtStatus* create_status(const OrtApi& api, ErrorCode code, const char* message) {
  return reinterpret_cast<OrtStatus* (*)(int, const char*)>(api[0])(code, message);
}

inline const char* error_message(const OrtApi& api, const OrtStatus* status) {
  return reinterpret_cast<const char* (*)(const OrtStatus*)>(api[2])(status);
}

inline void release_status(const OrtApi& api, OrtStatus* status) {
  reinterpret_cast<void (*)(OrtStatus*)>(api[93])(status);
}

inline void release_shape(const OrtApi& api, OrtTensorTypeAndShapeInfo* info) {
  reinterpret_cast<void (*)(OrtTensorTypeAndShapeInfo*)>(api[99])(info);
}

constexpr Function<26, const char*, OrtCustomOpDomain**> create_domain;
constexpr Function<27, OrtCustomOpDomain*, const OrtCustomOp*> add_to_domain;
constexpr Function<28, OrtSessionOptions*, OrtCustomOpDomain*> add_domain;
constexpr Function<51, OrtValue*, void**> tensor_data;
constexpr Function<60, const OrtTensorTypeAndShapeInfo*, int*> element_type;
constexpr Function<61, const OrtTensorTypeAndShapeInfo*, size_t*> rank;
constexpr Function<62, const OrtTensorTypeAndShapeInfo*, int64_t*, size_t> dimensions;
constexpr Function<65, const OrtValue*, OrtTensorTypeAndShapeInfo**> tensor_shape;
constexpr Function<85, const OrtKernelInfo*, const char*, float*> float_attribute;
constexpr Function<86, const OrtKernelInfo*, const char*, int64_t*> int_attribute;
constexpr Function<87, const OrtKernelInfo*, const char*, char*, size_t*> string_attribute;
constexpr Function<88, const OrtKernelContext*, size_t*> input_count;
constexpr Function<90, const OrtKernelContext*, size_t, const OrtValue**> input;
constexpr Function<91, OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**> output;
constexpr Function<162, const OrtKernelInfo*, const char*, float*, size_t*> floats_attribute;
constexpr Function<163, const OrtKernelInfo*, const char*, int64_t*, size_t*> ints_attribute;
constexpr Function<244, const OrtKernelInfo*, char*, size_t*> node_name;
constexpr Function<274, const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*>
    parallel_for;

}  // namespace latentforge::ort
