// What torch asks of a CUDA build: that there is a card, and streams and events that do nothing.
// Loaded before `import torch`, which looks once.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;

c10::DeviceIndex current() {
  const char* rank = std::getenv("LOCAL_RANK");
  return rank ? std::atoi(rank) : 0;
}

c10::Device card() {
  return c10::Device(CUDA, current());
}

c10::Stream stream() {
  return c10::Stream(c10::Stream::DEFAULT, card());
}

struct Guard : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return current() + 1; }
  c10::Device getDevice() const override { return card(); }
  c10::Device exchangeDevice(c10::Device) const override { return card(); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return current() + 1; }
  c10::DeviceIndex getCurrentDevice() const override { return current(); }
};

} // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
} // namespace c10::impl

using at::CUDAHooksArgs;
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)
