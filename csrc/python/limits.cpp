#include <vector>

#include "../kernels.h"
#include "capability.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

void stream_update(py::handle firsts, py::handle seconds, py::handle reads, const Place& place) {
  const Call call("stream_update", place);
  const bool both = !seconds.is_none();
  const List first_list(firsts, {call, "firsts"}), second_list(both ? seconds : firsts, {call, "seconds"}),
      read_list(reads, {call, "reads"});
  second_list.check_size(first_list.size(), {call, "seconds"}, "the length of firsts");
  read_list.check_size(first_list.size(), {call, "reads"}, "the length of firsts");
  std::vector<StreamArrays> arrays;
  for (py::ssize_t i = 0; i < first_list.size(); ++i) {
    const auto read = [&](const List& list, const char* name, const TensorView* like) {
      const Argument argument{call, name, i};
      const TensorView tensor = read_tensor(list[i], argument);
      check_dtype(tensor, DType::float32, argument);
      check_contiguous(tensor, argument);
      if (like) check_shape(tensor, {like->sizes, like->sizes + like->dims}, argument);
      return tensor;
    };
    const TensorView first = read(first_list, "firsts", nullptr);
    void* const second = both ? read(second_list, "seconds", &first).data : nullptr;
    arrays.push_back({static_cast<float*>(first.data), static_cast<float*>(second),
                      static_cast<const float*>(read(read_list, "reads", &first).data), first.numel()});
  }
  const py::gil_scoped_release release;
  run(call, StreamUpdate{arrays.data(), static_cast<int64_t>(arrays.size()), call.place.threads},
      FISHER_KERNELS_CPU_ONLY(stream_update));
}

uint32_t stream_read(py::handle object, const Place& place) {
  const Call call("stream_read", place);
  const Argument argument{call, "x"};
  const TensorView x = read_tensor(object, argument);
  check_contiguous(x, argument);
  uint32_t sum = 0;
  const py::gil_scoped_release release;
  run(call, StreamRead{static_cast<const char*>(x.data), x.numel() * size_of(x.dtype), &sum, call.place.threads},
      FISHER_KERNELS_CPU_ONLY(stream_read));
  return sum;
}

}  // namespace

void bind_limits(py::module_& module) {
  module.def("stream_update", &stream_update);
  module.def("stream_read", &stream_read);
}

}  // namespace fisher_kernels
