#include "tensor.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "../common/dlpack.h"

namespace fisher_kernels {

namespace {

PyTypeObject* tensor_type = nullptr;
dlpack::TensorFromObject tensor_from_object = nullptr;
dlpack::Allocate allocate = nullptr;
PyObject* is_neg = nullptr;        // torch.Tensor.is_neg
PyObject* is_inference = nullptr;  // torch.Tensor.is_inference

/// Where torch keeps the dispatch keys of a tensor, and the bits that matter here; fisher_kernels/_dispatch_keys.py finds
/// out. Asking torch costs ten times what everything else costs that is done for a tensor.
struct KeyBits {
  bool known = false;
  ptrdiff_t implementation = 0;  // of the pointer in the Python object
  ptrdiff_t keys = 0;            // in what it points to
  uint64_t negative = 0;
  uint64_t tracked = 0;  // what an inference tensor lacks
};
KeyBits key_bits;

uint64_t keys_of(py::handle tensor) {
  const char* implementation;
  uint64_t keys;
  std::memcpy(&implementation, reinterpret_cast<const char*>(tensor.ptr()) + key_bits.implementation,
              sizeof(implementation));
  std::memcpy(&keys, implementation + key_bits.keys, sizeof(keys));
  return keys;
}

/// The message of the Python exception that is set, which is cleared.
std::string take_python_error() {
  const py::error_already_set error;
  return py::str(error.value());
}

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

/// What a method of torch.Tensor that takes nothing and tells yes or no says of a tensor.
bool says(PyObject* method, py::handle tensor) {
  PyObject* const answer = PyObject_CallOneArg(method, tensor.ptr());
  if (answer == nullptr) throw py::error_already_set();
  const bool yes = answer == Py_True;
  Py_DECREF(answer);
  return yes;
}

bool is_negated(py::handle tensor) {
  return key_bits.known ? (keys_of(tensor) & key_bits.negative) != 0 : says(is_neg, tensor);
}

bool is_untracked(py::handle tensor) {
  return key_bits.known ? (keys_of(tensor) & key_bits.tracked) == 0 : says(is_inference, tensor);
}

bool to_dtype(const dlpack::DataType& type, DType* dtype) {
  if (type.lanes != 1) return false;
  if (type.code == dlpack::kFloat && type.bits == 32) return *dtype = DType::float32, true;
  if (type.code == dlpack::kFloat && type.bits == 64) return *dtype = DType::float64, true;
  if (type.code == dlpack::kBfloat && type.bits == 16) return *dtype = DType::bfloat16, true;
  if (type.code == dlpack::kFloat && type.bits == 16) return *dtype = DType::float16, true;
  if (type.code == dlpack::kInt && type.bits == 64) return *dtype = DType::int64, true;
  return false;
}

std::string torch_dtype(py::handle tensor) { return py::str(tensor.attr("dtype")); }

std::string torch_device(py::handle tensor) { return py::str(tensor.attr("device")); }

std::string device_name(const Place& place) {
  return place.is_on_gpu() ? "cuda:" + std::to_string(place.stream.device) : "cpu";
}

[[noreturn]] void device_error(py::handle tensor, const Argument& argument, const std::string& expected) {
  value_error(argument, "is on " + torch_device(tensor) + ", expected " + expected);
}

bool is_on_host(const dlpack::Device& device) {
  return device.type == dlpack::kCpu || device.type == dlpack::kCudaHost;
}

bool is_at(const dlpack::Device& device, const Place& place) {
  if (!place.is_on_gpu()) return is_on_host(device);
  return device.type == dlpack::kCuda && device.index == place.stream.device;
}

dlpack::Tensor read_anywhere(py::handle object, const Argument& argument) {
  if (!PyType_IsSubtype(Py_TYPE(object.ptr()), tensor_type)) {
    type_error(argument, "is of type " + type_name(object) + ", expected a torch.Tensor");
  }
  dlpack::Tensor tensor;
  if (tensor_from_object(object.ptr(), &tensor) != 0) {
    const std::string error = take_python_error();
    const std::string expected = device_name(argument.call.place);
    if (torch_device(object) != expected) device_error(object, argument, expected);
    value_error(argument, "has no memory to read: " + error.substr(0, error.find('\n')));
  }
  // torch hands out the memory as it is, of a tensor too that is negated when it is read.
  if (is_negated(object)) {
    throw Unresolved(argument.text() + " is negated when it is read (is_neg()), expected memory that holds its numbers");
  }
  return tensor;
}

TensorView view_of(const dlpack::Tensor& tensor, py::handle object, const Argument& argument) {
  TensorView view{static_cast<char*>(tensor.data) + tensor.byte_offset, tensor.sizes, tensor.strides, tensor.dims,
                  DType::float32};
  if (!to_dtype(tensor.dtype, &view.dtype)) {
    type_error(argument,
               "has dtype " + torch_dtype(object) + ", expected a floating-point type of 16, 32 or 64 bits, or int64");
  }
  if (tensor.data == nullptr && view.numel() > 0) {
    throw Unresolved(argument.text() + " has no memory to read, expected some for shape " + view.shape());
  }
  return view;
}

}  // namespace

std::string Argument::text() const {
  std::string text = std::string(call.function) + ": " + name;
  if (index >= 0) text += "[" + std::to_string(index) + "]";
  return text;
}

void value_error(const Argument& argument, const std::string& fault) {
  throw py::value_error(argument.text() + " " + fault);
}

void type_error(const Argument& argument, const std::string& fault) {
  throw py::type_error(argument.text() + " " + fault);
}

std::string shape_text(const int64_t* sizes, int dims) {
  std::string text = "(";
  for (int d = 0; d < dims; ++d) text += (d > 0 ? ", " : "") + std::to_string(sizes[d]);
  return text + (dims == 1 ? ",)" : ")");
}

void load_exchange_api() {
  const py::object type = py::module_::import("torch").attr("Tensor");
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) {
    throw py::import_error(
        "torch has no DLPack exchange interface (torch.Tensor.__dlpack_c_exchange_api__); torch >= 2.11 has");
  }
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  const auto* header =
      static_cast<const dlpack::ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
  if (header == nullptr) throw py::error_already_set();
  while (header != nullptr && header->version.major != dlpack::kMajorVersion) header = header->older;
  if (header == nullptr) throw py::import_error("torch's DLPack exchange interface has no version 1");
  const auto* api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  if (api->tensor_from_object == nullptr)
    throw py::import_error("torch's DLPack exchange interface cannot read without owning");
  tensor_from_object = api->tensor_from_object;
  allocate = api->allocate;
  // Kept for the life of the process.
  is_neg = py::object(type.attr("is_neg")).release().ptr();
  is_inference = py::object(type.attr("is_inference")).release().ptr();
  tensor_type = reinterpret_cast<PyTypeObject*>(py::object(type).release().ptr());
}

void set_key_bits(ptrdiff_t implementation, ptrdiff_t keys, uint64_t negative, uint64_t tracked) {
  key_bits = {negative != 0 && tracked != 0, implementation, keys, negative, tracked};
}

std::pair<bool, bool> tensor_flags(py::handle tensor) { return {is_negated(tensor), is_untracked(tensor)}; }

TensorView read_tensor(py::handle object, const Argument& argument) {
  const dlpack::Tensor tensor = read_anywhere(object, argument);
  if (!is_at(tensor.device, argument.call.place)) device_error(object, argument, device_name(argument.call.place));
  return view_of(tensor, object, argument);
}

void check_not_inference(py::handle object, const Argument& argument) {
  if (!is_untracked(object)) return;
  if (py::module_::import("torch").attr("is_inference_mode_enabled")().cast<bool>()) return;
  throw std::runtime_error(argument.text() +
                           " is an inference tensor. Inplace update to inference tensor outside InferenceMode is not "
                           "allowed: write to a clone of it");
}

TensorView read_written(py::handle object, const Argument& argument) {
  const TensorView tensor = read_tensor(object, argument);
  check_not_inference(object, argument);
  return tensor;
}

Scalar read_scalar(py::handle object, const Argument& argument) {
  const dlpack::Tensor tensor = read_anywhere(object, argument);
  const bool on_host = is_on_host(tensor.device);
  if (!on_host && !is_at(tensor.device, argument.call.place)) {
    const std::string device = device_name(argument.call.place);
    device_error(object, argument, device == "cpu" ? device : "cpu or " + device);
  }
  const TensorView view = view_of(tensor, object, argument);
  if (view.numel() != 1) value_error(argument, "has shape " + view.shape() + ", expected one element");
  if (view.dtype != DType::float64 && view.dtype != DType::float32) {
    type_error(argument, std::string("has dtype ") + name(view.dtype) + ", expected float32 or float64");
  }
  if (!on_host) return {1.0, view.data, view.dtype};
  const double value =
      view.dtype == DType::float64 ? *static_cast<const double*>(view.data) : *static_cast<const float*>(view.data);
  // Where CUDA kernels run on the host they find some numbers as they would on a GPU, and are handed others.
  const bool as_on_gpu = argument.call.place.runs_cuda() && !argument.call.place.is_on_gpu();
  return {value, as_on_gpu && view.dtype == DType::float32 ? view.data : nullptr, view.dtype};
}

Scalar read_scalar(py::handle object, const Argument& argument, DType dtype) {
  check_dtype(view_of(read_anywhere(object, argument), object, argument), dtype, argument);
  return read_scalar(object, argument);
}

bool is_contiguous(const TensorView& tensor) {
  if (tensor.numel() == 0) return true;
  int64_t stride = 1;
  for (int d = tensor.dims - 1; d >= 0; --d) {
    if (tensor.sizes[d] != 1 && tensor.strides[d] != stride) return false;
    stride *= tensor.sizes[d];
  }
  return true;
}

bool same_shape(const TensorView& a, const TensorView& b) {
  if (a.dims != b.dims) return false;
  for (int d = 0; d < a.dims; ++d) {
    if (a.sizes[d] != b.sizes[d]) return false;
  }
  return true;
}

void check_dtype(const TensorView& tensor, DType expected, const Argument& argument) {
  if (tensor.dtype == expected) return;
  type_error(argument, std::string("has dtype ") + name(tensor.dtype) + ", expected " + name(expected));
}

void check_float(const TensorView& tensor, const Argument& argument) {
  if (tensor.dtype != DType::int64) return;
  type_error(argument, "has dtype int64, expected float32, float64, bfloat16 or float16");
}

void check_dims(const TensorView& tensor, int expected, const Argument& argument) {
  if (tensor.dims == expected) return;
  value_error(argument, "has shape " + tensor.shape() + ", expected " + std::to_string(expected) + " dimensions");
}

void check_shape(const TensorView& tensor, const std::vector<int64_t>& expected, const Argument& argument) {
  const int dims = static_cast<int>(expected.size());
  const TensorView wanted{nullptr, expected.data(), nullptr, dims, tensor.dtype};
  if (same_shape(tensor, wanted)) return;
  value_error(argument, "has shape " + tensor.shape() + ", expected " + wanted.shape());
}

void check_contiguous(const TensorView& tensor, const Argument& argument) {
  if (is_contiguous(tensor)) return;
  value_error(argument,
              "is not contiguous: shape " + tensor.shape() + ", strides " + shape_text(tensor.strides, tensor.dims));
}

void check_range(double value, bool in_range, const char* expected, const Argument& argument) {
  if (in_range) return;
  value_error(argument, "is " + std::string(py::str(py::float_(value))) + ", expected " + expected);
}

void check_coefficient(double value, const Argument& argument) {
  check_range(value, std::isfinite(value) && value >= 0, "a finite number >= 0", argument);
}

List::List(py::handle object, const Argument& argument) {
  if (!PyList_Check(object.ptr()) && !PyTuple_Check(object.ptr())) {
    type_error(argument, "is of type " + type_name(object) + ", expected a list");
  }
  items_ = PySequence_Fast_ITEMS(object.ptr());
  size_ = PySequence_Fast_GET_SIZE(object.ptr());
}

void List::check_size(py::ssize_t expected, const Argument& argument, const char* why) const {
  if (size_ == expected) return;
  value_error(argument, "has " + std::to_string(size_) + " entries, expected " + std::to_string(expected) + ", " + why);
}

Scratch::Scratch(const Stream& stream, size_t bytes) {
  if (bytes == 0) return;
  int64_t size = static_cast<int64_t>(bytes), stride = 1;
  const bool on_host = stream.device == kHost;
  dlpack::Tensor like{nullptr, {on_host ? dlpack::kCpu : dlpack::kCuda, on_host ? 0 : stream.device}, 1,
                      {dlpack::kUInt, 8, 1}, &size, &stride, 0};
  std::string error;
  const auto keep_error = [](void* into, const char* kind, const char* message) {
    *static_cast<std::string*>(into) = std::string(kind) + ": " + message;
  };
  dlpack::ManagedTensor* tensor = nullptr;
  if (allocate(&like, &tensor, &error, keep_error) != 0) throw std::runtime_error(error);
  owner_ = tensor;
  data_ = static_cast<char*>(tensor->tensor.data) + tensor->tensor.byte_offset;
}

Scratch::~Scratch() {
  auto* const tensor = static_cast<dlpack::ManagedTensor*>(owner_);
  if (tensor != nullptr) tensor->deleter(tensor);
}

}  // namespace fisher_kernels
