// What ONNX Runtime gives an operator: attributes when it is created, tensors and threads when it runs.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>

#include "checks.h"
#include "ort.h"

namespace latentforge {

inline const OrtApi* api = nullptr;  // of this process's ONNX Runtime

// Throws if a function of the API reported an error.
inline void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = ort::error_message(*api, status);
  ort::release_status(*api, status);
  throw std::runtime_error("latentforge: " + message);
}

// Returns true if a function of the API reported no error.
inline bool succeeds(OrtStatus* status) {
  if (status != nullptr) ort::release_status(*api, status);
  return status == nullptr;
}

// Returns the name of the node that an operator is created for.
inline std::string node_name(const OrtKernelInfo* info) {
  size_t size = 0;  // with the final zero
  if (!succeeds(ort::node_name(*api, info, nullptr, &size))) return "";
  std::string name(size, 0);
  if (!succeeds(ort::node_name(*api, info, name.data(), &size))) return "";
  name.resize(size > 0 ? size - 1 : 0);
  return name;
}

// Attributes of a node, each within the range that the operator takes.
class Attributes {
 public:
  Attributes(const Checks& checks, const OrtKernelInfo* info) : checks_(checks), info_(info) {}

  int64_t integer(const char* name, int64_t low, int64_t high) const {
    int64_t value = 0;
    if (!succeeds(ort::int_attribute(*api, info_, name, &value))) refuse(name, "an integer");
    checks_.integer(name, value, low, high);
    return value;
  }

  // Returns an attribute that graphs of earlier versions lack, or 0.
  int64_t integer_or_0(const char* name, int64_t low, int64_t high) const {
    return present(name) ? integer(name, low, high) : 0;
  }

  // Returns four integers from 0 to high.
  std::array<int64_t, 4> four(const char* name, int64_t high) const {
    std::array<int64_t, 4> values{};
    size_t count = values.size();
    if (!succeeds(ort::ints_attribute(*api, info_, name, values.data(), &count)) || count != 4)
      refuse(name, "four integers");
    for (const int64_t value : values) checks_.integer(name, value, 0, high);
    return values;
  }

  float finite(const char* name) const {
    float value = 0;
    if (!succeeds(ort::float_attribute(*api, info_, name, &value))) refuse(name, "a float");
    if (!std::isfinite(value)) found(name, "a finite number", std::to_string(value));
    return value;
  }

  float positive(const char* name) const {
    const float value = finite(name);
    if (value < 0) found(name, "a number of at least 0", std::to_string(value));
    return value;
  }

  // Refuses attributes that ONNX's operator of this name has and this one would ignore.
  void none_of(std::initializer_list<const char*> names) const {
    for (const char* name : names)
      if (present(name)) found(name, "none", "one");
  }

 private:
  const Checks& checks_;
  const OrtKernelInfo* info_;

  bool present(const char* name) const {
    int64_t integer = 0;
    float number = 0;
    size_t size = 0;  // with no buffer, these functions return the size
    return succeeds(ort::int_attribute(*api, info_, name, &integer)) ||
           succeeds(ort::float_attribute(*api, info_, name, &number)) ||
           succeeds(ort::string_attribute(*api, info_, name, nullptr, &size)) ||
           succeeds(ort::ints_attribute(*api, info_, name, nullptr, &size)) ||
           succeeds(ort::floats_attribute(*api, info_, name, nullptr, &size));
  }

  [[noreturn]] void refuse(const char* name, const char* expected) const {
    found(name, expected, present(name) ? "something else" : "none");
  }

  [[noreturn]] void found(const char* name, const char* expected, const std::string& what) const {
    checks_.refuse(std::string("attribute ") + name, expected, what);
  }
};

// Inputs and outputs of one run of an operator.
class Run {
 public:
  Run(const Checks& checks, const Input* inputs, OrtKernelContext* context)
      : checks_(checks), inputs_(inputs), context_(context) {
    check(ort::input_count(*api, context, &count_));
  }

  // Returns an input of the type that the operator takes, with at least this many dimensions; or
  // none if it was omitted.
  Tensor ranked(size_t index, size_t rank) const {
    Tensor tensor;
    tensor.checks = &checks_, tensor.input = &inputs_[index];
    const OrtValue* value = nullptr;
    if (index < count_) check(ort::input(*api, context_, index, &value));
    if (value != nullptr) describe(value, tensor);
    tensor.expect_type();
    tensor.expect_limits(rank);
    if (value != nullptr) tensor.data = data_of(const_cast<OrtValue*>(value));
    return tensor;
  }

  // Returns an input of this shape, or none if it was omitted.
  Tensor shaped(size_t index, const Shape& shape) const {
    const Tensor tensor = ranked(index, 0);
    tensor.expect(shape);
    return tensor;
  }

  float* output(size_t index, const Shape& shape) const {
    OrtValue* value = nullptr;
    check(ort::output(*api, context_, index, shape.data(), shape.size(), &value));
    return static_cast<float*>(data_of(value));
  }

  Parallel parallel() const {
    static const int threads = int(std::clamp(std::thread::hardware_concurrency(), 1u, 256u));
    return {run, context_, threads};
  }

 private:
  const Checks& checks_;
  const Input* inputs_;
  OrtKernelContext* context_;
  size_t count_ = 0;

  static void describe(const OrtValue* value, Tensor& tensor) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(ort::tensor_shape(*api, value, &info));
    size_t rank = 0;
    const bool described = succeeds(ort::rank(*api, info, &rank)) &&
                           succeeds(ort::element_type(*api, info, &tensor.type));
    tensor.shape.resize(rank);
    tensor.present = described && succeeds(ort::dimensions(*api, info, tensor.shape.data(), rank));
    ort::release_shape(*api, info);
  }

  static void* data_of(OrtValue* value) {
    void* data = nullptr;
    check(ort::tensor_data(*api, value, &data));
    return data;
  }

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

}  // namespace latentforge
