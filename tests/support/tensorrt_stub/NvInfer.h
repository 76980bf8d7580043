// The calls of TensorRT 10 that the C++ program makes, declared as NvInferRuntime.h declares them,
// over a toy: a plan is the text "toy PIXELS CLASSES MIN MAX MIN MAX", its input is float32 (-1, PIXELS), and
// logit i of an image is (i + 1) times the sum of its pixels.  For tests; it says nothing of the real
// TensorRT but that the program is spelt and wired as its documentation has it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <sstream>
#include <string>

namespace nvinfer1 {

struct Dims {
  std::int32_t nbDims;
  std::int64_t d[8];
};
enum class DataType : std::int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBOOL = 4, kUINT8 = 5 };
enum class TensorIOMode : std::int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class OptProfileSelector : std::int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };

class ILogger {
 public:
  enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3 };
  virtual void log(Severity severity, const char* message) noexcept = 0;
  virtual ~ILogger() = default;
};

struct Toy {
  std::int64_t pixels = 0, classes = 0, low[2] = {0, 0}, high[2] = {0, 0};
};

class IExecutionContext {
 public:
  explicit IExecutionContext(const Toy& toy) : toy_(toy) {}
  bool setOptimizationProfileAsync(std::int32_t index, cudaStream_t) noexcept {
    profile_ = index;
    return index == 0 || index == 1;
  }
  bool setInputShape(const char* name, const Dims& dims) noexcept {
    batch_ = dims.d[0];
    return std::string(name) == "image" && dims.nbDims == 2 && dims.d[1] == toy_.pixels &&
           toy_.low[profile_] <= batch_ && batch_ <= toy_.high[profile_];
  }
  bool setTensorAddress(const char* name, void* data) noexcept {
    (std::string(name) == "image" ? in_ : out_) = static_cast<float*>(data);
    return true;
  }
  bool enqueueV3(cudaStream_t) noexcept {
    for (std::int64_t image = 0; image < batch_; ++image) {
      float sum = 0.0f;
      for (std::int64_t pixel = 0; pixel < toy_.pixels; ++pixel) sum += in_[image * toy_.pixels + pixel];
      for (std::int64_t one = 0; one < toy_.classes; ++one) {
        out_[image * toy_.classes + one] = static_cast<float>(one + 1) * sum;
      }
    }
    return batch_ > 0;
  }

 private:
  Toy toy_;
  std::int32_t profile_ = 0;
  std::int64_t batch_ = 0;
  float* in_ = nullptr;
  float* out_ = nullptr;
};

class ICudaEngine {
 public:
  explicit ICudaEngine(const Toy& toy) : toy_(toy) {}
  IExecutionContext* createExecutionContext() noexcept { return new IExecutionContext(toy_); }
  std::int32_t getNbIOTensors() const noexcept { return 2; }
  const char* getIOTensorName(std::int32_t index) const noexcept { return index ? "image" : "logits"; }
  TensorIOMode getTensorIOMode(const char* name) const noexcept {
    return std::string(name) == "image" ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
  }
  DataType getTensorDataType(const char*) const noexcept { return DataType::kFLOAT; }
  Dims getTensorShape(const char* name) const noexcept {
    return {2, {-1, std::string(name) == "image" ? toy_.pixels : toy_.classes}};
  }
  std::int32_t getNbOptimizationProfiles() const noexcept { return 2; }
  Dims getProfileShape(const char*, std::int32_t index, OptProfileSelector which) const noexcept {
    return {2, {which == OptProfileSelector::kMIN ? toy_.low[index] : toy_.high[index], toy_.pixels}};
  }

 private:
  Toy toy_;
};

class IRuntime {
 public:
  explicit IRuntime(ILogger& logger) : logger_(logger) {}
  ICudaEngine* deserializeCudaEngine(const void* data, std::size_t bytes) noexcept {
    std::istringstream plan(std::string(static_cast<const char*>(data), bytes));
    std::string magic;
    Toy toy;
    plan >> magic >> toy.pixels >> toy.classes >> toy.low[0] >> toy.high[0] >> toy.low[1] >> toy.high[1];
    if (magic == "toy" && plan) return new ICudaEngine(toy);
    logger_.log(ILogger::Severity::kERROR, "magicTag does not match");
    logger_.log(ILogger::Severity::kINFO, "chatter");
    return nullptr;
  }

 private:
  ILogger& logger_;
};

inline IRuntime* createInferRuntime(ILogger& logger) noexcept { return new IRuntime(logger); }

}  // namespace nvinfer1
