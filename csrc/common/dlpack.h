#pragma once

#include <cstdint>

// The part of DLPack 1.x's binary interface that reads a tensor without owning it. Declared here, and not included from
// torch, so that building needs no torch and one binary serves every torch that offers the interface.
// Specification: https://dmlc.github.io/dlpack/latest/c_api.html
namespace fisher_kernels::dlpack {

enum DeviceType : int32_t {
  kCpu = 1,
  kCuda = 2,
  kCudaHost = 3,
};

enum TypeCode : uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBfloat = 4,
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct Device {
  DeviceType type;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t* sizes;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* older;  // an interface of an earlier major version, or null
};

struct ManagedTensor {
  Version version;
  void* manager;
  void (*deleter)(ManagedTensor* self);  // the tensor is no longer used
  uint64_t flags;
  Tensor tensor;
};

// A new tensor with the device, dtype and sizes of another. Returns 0, or -1 after calling set_error. Needs no Python.
using Allocate = int (*)(Tensor* like, ManagedTensor** out, void* error,
                         void (*set_error)(void* error, const char* kind, const char* message));

// Returns 0, or -1 with a Python exception set. Sizes and strides stay the property of the Python object.
using TensorFromObject = int (*)(void* object, Tensor* out);

struct ExchangeApi {
  ExchangeHeader header;
  Allocate allocate;
  void* managed_from_object;
  void* managed_to_object;
  TensorFromObject tensor_from_object;  // may be null
  void* current_stream;
};

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";

}  // namespace fisher_kernels::dlpack
