// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "handle.h"
#include "listener.h"

#include <optional>

namespace nvmx::binding {

/// A vCPU and the JS callback that hears of finished runs.
class VcpuHandle : public Listener {
  public:
    VcpuHandle(Napi::Env env, std::shared_ptr<kvm::VcpuThread> thread, Napi::Function on_exit);
    ~VcpuHandle() override;

    kvm::VcpuThread &thread() const { return *thread_; }
    /// KVM_RUN's errno when the run is over already; else the callback hears of it.
    std::optional<int> start_run();
    void close();

  private:
    void heard() override { thread_->finish_run(); }

    std::shared_ptr<kvm::VcpuThread> thread_;
};

template <> struct HandleType<VcpuHandle> {
    static constexpr const char *name = "Vcpu";
    static constexpr napi_type_tag tag{0x4b1f2d6a90c84e37, 0xa1d0c35e7f6b2904};
};

void define_vcpu(Napi::Env env, Napi::Object exports);

} // namespace nvmx::binding
