// A CUDA device for a PyTorch that was built without one. A tensor that says cuda:0 lies in the memory of the
// host, and the kernels for CPUs compute on it. Loaded before PyTorch, which asks for CUDA's hooks only once.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/TensorUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <list>
#include <unordered_map>

namespace {

using at::Tensor;
using torch::jit::Stack;
const int DEVICES = 2;
c10::Device DEVICE(c10::DeviceType::CUDA, 0);  // the one of this process

void choose_device(int64_t index) { DEVICE.set_index(static_cast<c10::DeviceIndex>(index)); }

// ---- memory

struct Allocator : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr host = c10::GetCPUAllocator()->allocate(bytes);
    void* data = host.get();
    auto deleter = host.get_deleter();
    return {data, host.release_context(), deleter, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} allocator;

// A tensor in the same memory, on the other device.
Tensor same_memory(const Tensor& t, c10::Device device, c10::DispatchKey key, c10::Allocator* allocator) {
  auto* owner = new c10::Storage(t.storage());
  c10::DataPtr data(owner->mutable_data(), owner, [](void* p) { delete static_cast<c10::Storage*>(p); }, device);
  c10::Storage storage(c10::Storage::use_byte_size_t(), owner->nbytes(), std::move(data), allocator, true);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), t.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return result;
}

Tensor on_host(const Tensor& t) {
  return t.is_cuda() ? same_memory(t, c10::kCPU, c10::DispatchKey::CPU, c10::GetCPUAllocator()) : t;
}

Tensor on_device(const Tensor& t) { return same_memory(t, DEVICE, c10::DispatchKey::CUDA, &allocator); }

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

// Calls f on every tensor of a value and puts what it returns in its place.
template <typename F>
c10::IValue map_tensors(const c10::IValue& value, F f) {
  if (value.isTensor())
    return value.toTensor().defined() ? c10::IValue(f(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<Tensor> mapped;
    for (const Tensor& t : value.toTensorVector()) mapped.push_back(f(t));
    return mapped;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> mapped;
    for (const auto& t : value.toOptionalTensorVector()) {
      if (t.has_value() && t->defined()) mapped.push_back(f(*t));
      else mapped.push_back(std::nullopt);
    }
    return mapped;
  }
  return value;
}

// ---- captures: the calls made under one, replayed on the same memory with the host's numbers as they were

struct Call {
  c10::OperatorHandle op;
  Stack arguments, results;
};
struct Graph {
  std::list<Call> calls;
  std::vector<std::pair<Tensor, Tensor>> overwritten;  // and what stood there before
};
std::unordered_map<int64_t, Graph> graphs;
int64_t graphs_made = 0;
Graph* capture = nullptr;  // the one that is being captured

int64_t begin_capture() {
  TORCH_CHECK(!capture, "a capture within a capture");
  capture = &graphs[++graphs_made];
  return graphs_made;
}

void end_capture() {  // nothing is computed under capture
  at::AutoDispatchBelowADInplaceOrView below;
  for (auto pair = capture->overwritten.rbegin(); pair != capture->overwritten.rend(); ++pair)
    pair->first.copy_(pair->second);
  capture->overwritten.clear();
  capture = nullptr;
}

void replay(int64_t graph) {
  at::AutoDispatchBelowADInplaceOrView below;
  for (Call& call : graphs.at(graph).calls) {
    Stack stack = call.arguments;
    call.op.callBoxed(&stack);
    for (size_t i = 0; i < stack.size(); ++i) {
      std::vector<Tensor> old;
      map_tensors(call.results[i], [&](const Tensor& t) { old.push_back(t); return t; });
      size_t at = 0;
      map_tensors(stack[i], [&](const Tensor& t) {
        if (t.numel() && t.data_ptr() != old[at].data_ptr()) old[at].copy_(t);
        ++at;
        return t;
      });
    }
  }
}

void drop_graph(int64_t graph) { graphs.erase(graph); }

// ---- waits: where the host waits for the device

extern "C" {
void (*report_wait)(const char* kind, const char* operation) = nullptr;
__attribute__((visibility("default"))) void pretended_on_wait(void (*callback)(const char*, const char*)) {
  report_wait = callback;
}
}

void wait(const char* kind, const std::string& operation) {
  TORCH_CHECK(!capture, "operation not permitted when stream is capturing: ", operation, " (", kind, ")");
  if (report_wait) report_wait(kind, operation.c_str());
}

bool is_any_of(const std::string& name, std::initializer_list<const char*> names) {
  return std::any_of(names.begin(), names.end(), [&](const char* other) { return name == other; });
}

// ---- every operator

// Of those that torch.use_deterministic_algorithms lists for CUDA.
const std::initializer_list<const char*> NOT_DETERMINISTIC = {
    "aten::_adaptive_avg_pool2d_backward", "aten::adaptive_max_pool2d_backward", "aten::bincount", "aten::cumsum",
    "aten::histc", "aten::nll_loss2d_forward", "aten::put_", "aten::upsample_bilinear2d_backward"};
const std::initializer_list<const char*> INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};
const std::initializer_list<const char*> READING = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero",
                                                    "aten::masked_select", "aten::_unique2"};

// The arguments of a call, as the kernel for CPUs takes them.
struct Arguments {
  Stack on_host;
  std::vector<std::pair<Tensor, Tensor>> of_device;  // a tensor of the device, and the same memory on the host
  bool any_of_host = false;  // but for numbers, which travel with the launch
  bool any_mask = false;

  Arguments(const std::string& name, c10::ArrayRef<c10::IValue> values) {
    for (const c10::IValue& value : values) {
      TORCH_CHECK(!value.isGenerator() || value.toGenerator().device().type() != c10::kCPU,
                  "Expected a 'cuda' device type for generator but found 'cpu' (", name, ")");
      on_host.push_back(value.isDevice() ? c10::IValue(c10::Device(c10::kCPU))
                                         : map_tensors(value, [&](const Tensor& t) { return take(t); }));
    }
  }

  Tensor take(const Tensor& t) {
    if (t.is_cuda()) {
      any_mask |= t.scalar_type() == at::kBool;
      of_device.emplace_back(t, ::on_host(t));
      return of_device.back().second;
    }
    any_of_host |= t.dim() > 0;
    return t.dim() == 0 && capture ? t.clone() : t;  // a graph has the number as it was
  }
};

// The device's prohibitions, and where the host waits for it.
void check(const std::string& name, const Arguments& arguments) {
  TORCH_CHECK(!at::globalContext().deterministicAlgorithms() || !is_any_of(name, NOT_DETERMINISTIC),
              name, " does not have a deterministic implementation, but use_deterministic_algorithms is set");
  const bool indexes = is_any_of(name, INDEXING);
  if (arguments.any_of_host && !arguments.of_device.empty()) {
    TORCH_CHECK(indexes, "Expected all tensors to be on the same device, but found at least two devices, "
                "cuda:0 and cpu! (", name, ")");
    wait("sent", name);
  }
  if (is_any_of(name, READING) || (indexes && arguments.any_mask)) wait("read back", name);
}

void keep_overwritten(const c10::FunctionSchema& schema, const Stack& arguments) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    const bool statistics = schema.name() == "aten::native_batch_norm" && (i == 3 || i == 4);
    if ((alias && alias->isWrite()) || statistics)
      map_tensors(arguments[i], [&](const Tensor& t) {
        capture->overwritten.emplace_back(t, t.clone());
        return t;
      });
  }
}

// Calls the kernel for CPUs on the same memory, and puts its results on the device.
void call(const c10::OperatorHandle& op, Stack* stack, Arguments& arguments) {
  if (capture) keep_overwritten(op.schema(), arguments.on_host);
  Stack results = arguments.on_host;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(&results);
  }
  if (capture) capture->calls.push_back({op, arguments.on_host, results});
  torch::jit::drop(*stack, arguments.on_host.size());
  for (const c10::IValue& result : results)
    stack->push_back(map_tensors(result, [&](const Tensor& t) {
      for (auto& [device, host] : arguments.of_device)
        if (t.is_same(host)) {  // an argument that was written to
          if (device.sizes() != host.sizes())  // and made larger, as arange does
            set_storage(device, on_device(host).storage(), host.storage_offset(), host.sizes(), host.strides());
          return device;
        }
      return on_device(t);
    }));
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  Arguments arguments(op.schema().name(), torch::jit::last(*stack, op.schema().arguments().size()));
  check(op.schema().name(), arguments);
  call(op, stack, arguments);
}

Tensor& copy(Tensor& self, const Tensor& source, bool) {
  if (self.is_cuda() != source.is_cuda()) wait(source.is_cuda() ? "read back" : "sent", "aten::copy_");
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  Stack stack{self, source, false};
  Arguments arguments("aten::copy_", stack);
  call(op, &stack, arguments);
  return self;
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!device || device->index() < DEVICES, "CUDA error: invalid device ordinal");
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const int64_t size = source.nbytes() / self.dtype().itemsize();
  return set_storage(self, std::move(source), 0, size, {1});
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &at::native::resize_);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("copy_", &copy);
  // These have a form for all devices, which would look for a kernel of CUDA's.
  for (const char* name : {"convolution", "convolution_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY(pretended, m) {
  m.def("choose_device(int index) -> ()", &choose_device);
  m.def("begin_capture() -> int", &begin_capture);
  m.def("end_capture() -> ()", &end_capture);
  m.def("replay(int graph) -> ()", &replay);
  m.def("drop_graph(int graph) -> ()", &drop_graph);
  m.def("on_host(Tensor(a) t) -> Tensor(a)", &on_host);
}

// ---- what autograd and the front end ask of a device

struct Guard : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  c10::DeviceIndex current_device() const override { return DEVICE.index(); }
  c10::DeviceIndex getCurrentDevice() const override { return DEVICE.index(); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return DEVICE.index(); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return DEVICE.index(); }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  int getNumGPUs() const override { return DEVICES; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};

const bool registered = [] {
  c10::SetAllocator(c10::kCUDA, &allocator);
  at::CUDAHooksRegistry()->Register("CUDAHooks", [](at::CUDAHooksArgs) -> std::unique_ptr<at::CUDAHooksInterface> {
    return std::make_unique<Hooks>();
  });
  return true;
}();

}  // namespace
