// Runs an ONNX graph on ONNX Runtime through its C API, which is stable: a program built with the
// headers of one version runs with the library of any later version.

#include <onnxruntime_c_api.h>

#include "model.h"

namespace {

const OrtApi& api() {
  static const OrtApi* const found = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (!found) {
    throw std::runtime_error(std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() +
                             " is older than the headers of this program");
  }
  return *found;
}

void check(OrtStatus* status) {
  if (!status) return;
  const std::string message = api().GetErrorMessage(status);
  api().ReleaseStatus(status);
  throw std::runtime_error("ONNX Runtime: " + message);
}

// Each type of the C API has a separate release function.
struct Release {
  void operator()(OrtEnv* it) const { api().ReleaseEnv(it); }
  void operator()(OrtSession* it) const { api().ReleaseSession(it); }
  void operator()(OrtSessionOptions* it) const { api().ReleaseSessionOptions(it); }
  void operator()(OrtTypeInfo* it) const { api().ReleaseTypeInfo(it); }
  void operator()(OrtMemoryInfo* it) const { api().ReleaseMemoryInfo(it); }
  void operator()(OrtValue* it) const { api().ReleaseValue(it); }
};
template <typename T>
using Owned = std::unique_ptr<T, Release>;

// Calls a function of the C API that returns a new object through its last argument.
template <typename T, typename Function, typename... Arguments>
Owned<T> made_by(Function function, Arguments... arguments) {
  T* made = nullptr;
  check(function(arguments..., &made));
  return Owned<T>(made);
}

ONNXTensorElementDataType onnx_type(Element element) {
  switch (element) {
    case Element::kUint8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    case Element::kFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

Tensor describe(const std::string& name, const OrtTypeInfo* type) {
  const OrtTensorTypeAndShapeInfo* info = nullptr;  // belongs to type
  check(api().CastTypeInfoToTensorInfo(type, &info));
  ONNXTensorElementDataType element{};
  check(api().GetTensorElementType(info, &element));
  std::size_t rank = 0;
  check(api().GetDimensionsCount(info, &rank));
  std::vector<std::int64_t> shape(rank);
  check(api().GetDimensions(info, shape.data(), rank));
  for (const Element known : {Element::kUint8, Element::kFloat16, Element::kFloat32}) {
    if (onnx_type(known) == element) return {name, known, shape};
  }
  throw std::runtime_error(name + " has an element type that this program does not support");
}

class OnnxRuntimeModel final : public Model {
 public:
  explicit OnnxRuntimeModel(const std::string& path)
      : environment_(made_by<OrtEnv>(api().CreateEnv, ORT_LOGGING_LEVEL_ERROR, "classify")),
        memory_(made_by<OrtMemoryInfo>(api().CreateCpuMemoryInfo, OrtArenaAllocator,
                                       OrtMemTypeDefault)) {
    const auto options = made_by<OrtSessionOptions>(api().CreateSessionOptions);
#ifdef EXACT_INT8
    // On CPUs without VNNI, ONNX Runtime's fast INT8 kernels saturate and lose accuracy.
    check(api().AddSessionConfigEntry(options.get(), "session.x64quantprecision", "1"));
#endif
    const std::basic_string<ORTCHAR_T> file(path.begin(), path.end());
    session_ = made_by<OrtSession>(api().CreateSession, environment_.get(), file.c_str(),
                                   options.get());
    input = tensor(api().SessionGetInputName, api().SessionGetInputTypeInfo);
    output = tensor(api().SessionGetOutputName, api().SessionGetOutputTypeInfo);
  }

  std::vector<char> run(const std::vector<char>& images, std::int64_t count) override {
    std::vector<std::int64_t> shape = input.shape;
    shape[0] = count;
    // ONNX Runtime does not write to inputs, but its C API takes no const pointer.
    const auto value = made_by<OrtValue>(
        api().CreateTensorWithDataAsOrtValue, memory_.get(), const_cast<char*>(images.data()),
        images.size(), shape.data(), shape.size(), onnx_type(input.element));
    const OrtValue* const inputs[] = {value.get()};
    const char* const from[] = {input.name.c_str()};
    const char* const to[] = {output.name.c_str()};
    OrtValue* raw = nullptr;
    check(api().Run(session_.get(), nullptr, from, inputs, 1, to, 1, &raw));
    const Owned<OrtValue> logits(raw);
    void* data = nullptr;
    check(api().GetTensorMutableData(logits.get(), &data));
    const char* const first = static_cast<const char*>(data);
    return {first, first + output.bytes() * static_cast<std::size_t>(count)};
  }

 private:
  template <typename Name, typename Type>
  Tensor tensor(Name name_of, Type type_of) {
    OrtAllocator* allocator = nullptr;  // belongs to ONNX Runtime, never freed
    check(api().GetAllocatorWithDefaultOptions(&allocator));
    char* text = nullptr;
    check(name_of(session_.get(), 0, allocator, &text));
    const std::string name = text;
    check(api().AllocatorFree(allocator, text));
    const auto type = made_by<OrtTypeInfo>(type_of, session_.get(), std::size_t{0});
    return describe(name, type.get());
  }

  Owned<OrtEnv> environment_;
  Owned<OrtMemoryInfo> memory_;
  Owned<OrtSession> session_;
};

}  // namespace

std::unique_ptr<Model> load_model(const std::string& path) {
  return std::make_unique<OnnxRuntimeModel>(path);
}
