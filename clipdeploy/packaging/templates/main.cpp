// Classifies raw images.  Written by clipdeploy.
//
//     classify MODEL IMAGES.raw [LOGITS.txt]
//
// IMAGES.raw has the images one after another, in the model's input format and without a header.
// Prints one line of logits per image, with enough digits to restore the same floats.  LOGITS.txt
// has the expected logits in this format; the exit code is 1 if an error exceeds 1 % of the largest
// logit.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>

#include "model.h"

namespace {

std::vector<char> read_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

std::vector<float> to_floats(const std::vector<char>& raw, Element element) {
  std::vector<float> values(raw.size() / bytes_of(element));
  for (std::size_t index = 0; index < values.size(); ++index) {
    if (element == Element::kFloat16) {
      std::uint16_t bits;
      std::memcpy(&bits, raw.data() + 2 * index, 2);
      values[index] = from_half(bits);
    } else {
      std::memcpy(&values[index], raw.data() + 4 * index, 4);
    }
  }
  return values;
}

std::int64_t count_images(const Model& model, std::size_t bytes) {
  const std::size_t one = model.input.bytes();
  if (bytes == 0 || bytes % one != 0) {
    throw std::runtime_error("the images have " + std::to_string(bytes) + " bytes, one image has " +
                             std::to_string(one));
  }
  const auto count = static_cast<std::int64_t>(bytes / one);
  const auto batch = model.input.shape[0];
  if (batch > 0 && batch != count) {
    throw std::runtime_error("the model has a fixed batch of " + std::to_string(batch) +
                             " images, the file has " + std::to_string(count));
  }
  return count;
}

// Whether the logits match those in a file, within the differences between processors.
bool agrees(const std::vector<float>& logits, const std::string& path) {
  std::ifstream stream(path);
  if (!stream) throw std::runtime_error("cannot read " + path);
  const std::vector<float> expected{std::istream_iterator<float>(stream),
                                    std::istream_iterator<float>()};
  if (expected.size() != logits.size()) {
    throw std::runtime_error(path + " has " + std::to_string(expected.size()) +
                             " logits, the model computed " + std::to_string(logits.size()));
  }
  float worst = 0.0f;
  float largest = 0.0f;
  for (std::size_t index = 0; index < logits.size(); ++index) {
    const float error = std::abs(logits[index] - expected[index]);
    // A NaN counts as an infinite difference.
    worst = std::max(worst, std::isnan(error) ? std::numeric_limits<float>::infinity() : error);
    largest = std::max(largest, std::abs(expected[index]));
  }
  std::cerr << "largest difference " << worst << ", largest logit " << largest << '\n';
  return worst <= 0.01f * largest;
}

int classify(int argc, char** argv) {
  const auto model = load_model(argv[1]);
  const auto images = read_file(argv[2]);
  const auto logits = to_floats(model->run(images, count_images(*model, images.size())),
                                model->output.element);
  std::cout.precision(std::numeric_limits<float>::max_digits10);
  for (std::size_t index = 0; index < logits.size(); ++index) {
    std::cout << logits[index] << ((index + 1) % model->output.elements() == 0 ? '\n' : ' ');
  }
  return argc < 4 || agrees(logits, argv[3]) ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 && argc != 4) {
    std::cerr << "usage: classify MODEL IMAGES.raw [LOGITS.txt]\n";
    return 2;
  }
  try {
    return classify(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}
