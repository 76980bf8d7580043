// The interface of a classifier, for every runtime.  Written by clipdeploy.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

enum class Element { kUint8, kFloat16, kFloat32 };

inline std::size_t bytes_of(Element element) {
  return element == Element::kUint8 ? 1 : element == Element::kFloat16 ? 2 : 4;
}

// A tensor of shape (batch, ...); a batch below 1 is dynamic.
struct Tensor {
  std::string name;
  Element element = Element::kFloat32;
  std::vector<std::int64_t> shape;

  // The number of elements of one image, or of its logits.
  std::size_t elements() const {
    std::size_t product = 1;
    for (std::size_t axis = 1; axis < shape.size(); ++axis) {
      if (shape[axis] < 1) throw std::runtime_error(name + " has a dynamic axis besides the batch");
      product *= static_cast<std::size_t>(shape[axis]);
    }
    return product;
  }
  std::size_t bytes() const { return elements() * bytes_of(element); }
};

class Model {
 public:
  virtual ~Model() = default;
  // Raw images, one after another in the input format -> raw logits of each.
  virtual std::vector<char> run(const std::vector<char>& images, std::int64_t count) = 0;

  Tensor input;
  Tensor output;
};

// Throws std::runtime_error with the message of the library.
std::unique_ptr<Model> load_model(const std::string& path);

// IEEE 754 binary16 -> binary32, exact.
inline float from_half(std::uint16_t bits) {
  const float sign = bits & 0x8000u ? -1.0f : 1.0f;
  const int exponent = (bits >> 10) & 0x1f;
  const int fraction = bits & 0x3ff;
  if (exponent == 0x1f) {
    return fraction ? std::numeric_limits<float>::quiet_NaN()
                    : sign * std::numeric_limits<float>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
}
