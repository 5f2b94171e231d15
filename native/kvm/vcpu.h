// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "exit_filter.h"
#include "fd.h"
#include "ioctls.h"
#include "mapping.h"
#include "stats.h"

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>

struct kvm_run;

namespace nvmx::kvm {

/// A vCPU fd (KVM_CREATE_VCPU on the VM fd) and its kvm_run page. KVM prefers that the creating thread makes
/// all calls, for speed only; the kernel serialises them, so a state ioctl from another thread during
/// KVM_RUN would block until the guest exits. VcpuThread keeps callers from doing that.
class Vcpu {
  public:
    /// Creates vCPU `id`; `run_size` is KVM_GET_VCPU_MMAP_SIZE.
    Vcpu(const Fd &vm, std::uint32_t id, std::size_t run_size);
    ~Vcpu() { close(); }

    std::uint32_t id() const { return id_; }
    const Fd &fd() const { return fd_; }
    const std::shared_ptr<Mapping> &run_page() const { return run_; }

    /// KVM_RUN, again and again while `filter` absorbs the exits. Returns 0 or the errno. Never retries:
    /// EINTR is the answer to a kick. The exit is in run_page().
    int run(ExitFilter *filter = nullptr);

    /// Nanoseconds that all vCPUs of this process have spent in run(), each thread counted.
    static std::uint64_t run_nanoseconds();

    /// KVM_RUN with immediate_exit: completes the last exit (the access it stands for) and enters no guest.
    /// EINTR when that was all; 0 when it led to another exit.
    int settle();

    /// Forgets kicks made before now. The owner calls it when it decides to run, not when the run starts,
    /// so that a kick in between still counts.
    void clear_kick();

    /// Makes a KVM_RUN that is under way, or the next one, return EINTR. Any thread.
    void kick();

    void close();

  private:
    kvm_run *page() const { return reinterpret_cast<kvm_run *>(run_->data()); }

    std::uint32_t id_;
    Fd fd_;
    std::shared_ptr<Mapping> run_;
    std::atomic<pid_t> runner_{0};
};

} // namespace nvmx::kvm
