// Runs an engine of TensorRT or TensorRT-RTX on the first GPU.
//
// Host code in engines stays disabled (IRuntime::setEngineHostCodeAllowed is never called).

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <fstream>
#include <iostream>
#include <iterator>

#include "model.h"

namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
  }
}

void check(bool done, const char* what) {
  if (!done) throw std::runtime_error(std::string("TensorRT cannot ") + what);
}

class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::cerr << "TensorRT: " << message << '\n';
  }
};

// GPU memory.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) { check(cudaMalloc(&data_, bytes)); }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

Element element_of(nvinfer1::DataType type, const std::string& name) {
  switch (type) {
    case nvinfer1::DataType::kUINT8: return Element::kUint8;
    case nvinfer1::DataType::kHALF: return Element::kFloat16;
    case nvinfer1::DataType::kFLOAT: return Element::kFloat32;
    default: break;
  }
  throw std::runtime_error(name + " has an element type that this program does not support");
}

class TensorRtModel final : public Model {
 public:
  explicit TensorRtModel(const std::string& path) {
    std::ifstream stream(path, std::ios::binary);
    if (!stream) throw std::runtime_error("cannot read " + path);
    const std::vector<char> plan{std::istreambuf_iterator<char>(stream),
                                 std::istreambuf_iterator<char>()};
    runtime_.reset(nvinfer1::createInferRuntime(logger_));
    check(runtime_ != nullptr, "start");
    engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    check(engine_ != nullptr, "load the engine: it is bound to one version, platform and GPU");
    context_.reset(engine_->createExecutionContext());
    check(context_ != nullptr, "make an execution context");
    for (std::int32_t index = 0; index < engine_->getNbIOTensors(); ++index) {
      const std::string name = engine_->getIOTensorName(index);
      const bool in = engine_->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT;
      (in ? input : output) = tensor(name);
    }
    check(cudaStreamCreate(&stream_));
  }

  ~TensorRtModel() override { cudaStreamDestroy(stream_); }

  std::vector<char> run(const std::vector<char>& images, std::int64_t count) override {
    choose_profile(count);
    std::vector<char> logits(output.bytes() * static_cast<std::size_t>(count));
    const Buffer in(images.size());
    const Buffer out(logits.size());
    copy(in.get(), images.data(), images.size(), cudaMemcpyHostToDevice);
    check(context_->setTensorAddress(input.name.c_str(), in.get()), "take the images");
    check(context_->setTensorAddress(output.name.c_str(), out.get()), "take room for the logits");
    check(context_->enqueueV3(stream_), "run the engine");
    copy(logits.data(), out.get(), logits.size(), cudaMemcpyDeviceToHost);
    check(cudaStreamSynchronize(stream_));
    return logits;
  }

 private:
  Tensor tensor(const std::string& name) const {
    const nvinfer1::Dims dims = engine_->getTensorShape(name.c_str());
    return {name, element_of(engine_->getTensorDataType(name.c_str()), name),
            {dims.d, dims.d + dims.nbDims}};
  }

  void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) const {
    check(cudaMemcpyAsync(to, from, bytes, kind, stream_));
  }

  // Chooses the first profile that accepts this many images.
  void choose_profile(std::int64_t count) {
    const char* const name = input.name.c_str();
    for (std::int32_t index = 0; index < engine_->getNbOptimizationProfiles(); ++index) {
      const auto low = engine_->getProfileShape(name, index, nvinfer1::OptProfileSelector::kMIN);
      auto high = engine_->getProfileShape(name, index, nvinfer1::OptProfileSelector::kMAX);
      if (count < low.d[0] || count > high.d[0]) continue;
      check(context_->setOptimizationProfileAsync(index, stream_), "choose a profile");
      high.d[0] = count;
      check(context_->setInputShape(name, high), "take this many images");
      return;
    }
    throw std::runtime_error("no profile of the engine accepts " + std::to_string(count) +
                             " images");
  }

  Logger logger_;
  // Members are destroyed in reverse order, as TensorRT requires.
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace

std::unique_ptr<Model> load_model(const std::string& path) {
  return std::make_unique<TensorRtModel>(path);
}
