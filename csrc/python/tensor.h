#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../common/dtype.h"
#include "../common/scalar.h"
#include "place.h"

namespace fisher_kernels {

namespace py = pybind11;

/// Where a value came from, for error messages: "adafisher_step_: grads[3]".
struct Argument {
  const Call& call;
  const char* name;
  py::ssize_t index = -1;  // position in a list argument, -1 for an argument that is no list

  std::string text() const;
};

/// A tensor's memory does not hold its numbers; a ValueError in Python, of a type of its own.
struct Unresolved : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void value_error(const Argument& argument, const std::string& fault);
[[noreturn]] void type_error(const Argument& argument, const std::string& fault);

/// "(2, 3)", as Python prints a shape.
std::string shape_text(const int64_t* sizes, int dims);

/// A tensor as it lies in memory. Sizes and strides (in elements) belong to the Python tensor, which outlives the
/// view.
struct TensorView {
  void* data;
  const int64_t* sizes;
  const int64_t* strides;
  int dims;
  DType dtype;

  int64_t numel() const {
    int64_t count = 1;
    for (int d = 0; d < dims; ++d) count *= sizes[d];
    return count;
  }

  std::string shape() const { return shape_text(sizes, dims); }
};

/// Finds torch's DLPack exchange interface; ImportError if torch has none. Called once, before anything reads a tensor.
void load_exchange_api();

/// Says where torch keeps the dispatch keys of a tensor: where the pointer is in the Python object, where the keys are in
/// what it points to, the bit of negated tensors and those that inference tensors lack. With zeros torch is asked.
void set_key_bits(ptrdiff_t implementation, ptrdiff_t keys, uint64_t negative, uint64_t tracked);

/// Whether a tensor is negated, and whether it is an inference tensor, as a read finds out.
std::pair<bool, bool> tensor_flags(py::handle tensor);

/// Reads a tensor of one of the types in DType, where the call runs; TypeError or ValueError for anything else.
TensorView read_tensor(py::handle object, const Argument& argument);

/// As torch has it, a tensor that was made in inference mode is not written outside it: RuntimeError.
void check_not_inference(py::handle object, const Argument& argument);

/// Reads a tensor that the call writes to.
TensorView read_written(py::handle object, const Argument& argument);

/// Reads a one-element float32 or float64 tensor: on the CPU its value, else where it lies on the GPU of the call.
Scalar read_scalar(py::handle object, const Argument& argument);

/// The same, of one dtype only.
Scalar read_scalar(py::handle object, const Argument& argument, DType dtype);

/// True if the elements lie in row-major order without gaps. Strides of dimensions of size one do not matter.
bool is_contiguous(const TensorView& tensor);

bool same_shape(const TensorView& a, const TensorView& b);

void check_dtype(const TensorView& tensor, DType expected, const Argument& argument);
void check_float(const TensorView& tensor, const Argument& argument);
void check_dims(const TensorView& tensor, int expected, const Argument& argument);
void check_shape(const TensorView& tensor, const std::vector<int64_t>& expected, const Argument& argument);
void check_contiguous(const TensorView& tensor, const Argument& argument);
void check_range(double value, bool in_range, const char* expected, const Argument& argument);
/// Finite and at least 0.
void check_coefficient(double value, const Argument& argument);

/// A Python list or tuple, read by position.
class List {
 public:
  List(py::handle object, const Argument& argument);

  py::ssize_t size() const { return size_; }
  py::handle operator[](py::ssize_t i) const { return items_[i]; }
  void check_size(py::ssize_t expected, const Argument& argument, const char* why) const;

 private:
  PyObject** items_;
  py::ssize_t size_;
};

}  // namespace fisher_kernels
