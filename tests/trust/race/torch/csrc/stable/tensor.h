// Replaces torch's header of this name: the part of torch::stable::Tensor that csrc/cpu uses, over plain memory.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace torch::stable {

class Tensor {
 public:
  using ScalarType = torch::headeronly::ScalarType;

  Tensor(void* data, ScalarType type, size_t element_size, std::vector<int64_t> sizes, std::vector<int64_t> strides)
      : data_(data), type_(type), element_size_(element_size), sizes_(std::move(sizes)), strides_(std::move(strides)) {}

  void* data_ptr() const { return data_; }
  ScalarType scalar_type() const { return type_; }
  size_t element_size() const { return element_size_; }
  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t i) const { return sizes_[i]; }
  int64_t stride(int64_t i) const { return strides_[i]; }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  const std::vector<int64_t>& strides() const { return strides_; }
  bool is_cuda() const { return false; }
  bool is_cpu() const { return true; }
  int32_t get_device_index() const { return -1; }

  int64_t numel() const {
    int64_t product = 1;
    for (int64_t size : sizes_) product *= size;
    return product;
  }

  bool is_contiguous() const {
    int64_t dense = 1;
    for (int64_t i = dim() - 1; i >= 0; dense *= sizes_[i--])
      if (sizes_[i] != 1 && strides_[i] != dense) return false;
    return true;
  }

 private:
  void* data_;
  ScalarType type_;
  size_t element_size_;
  std::vector<int64_t> sizes_, strides_;
};

}  // namespace torch::stable
