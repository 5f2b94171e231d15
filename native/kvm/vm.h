// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fd.h"
#include "ioctls.h"
#include "memory.h"
#include "vcpu_thread.h"

#include <memory>
#include <optional>
#include <vector>

namespace nvmx::kvm {

/// A VM fd (KVM_CREATE_VM on the system fd) with its memslots and vCPUs. VM ioctls may come from any thread
/// of the process that created it; this class itself belongs to one thread.
class Vm {
  public:
    Vm(int fd, std::size_t run_size);
    Vm(const Vm &) = delete;
    Vm &operator=(const Vm &) = delete;
    ~Vm() { close(); }

    const Fd &fd() const { return *fd_; }
    bool is_open() const { return fd_->is_open(); }

    /// KVM_CREATE_VCPU, on the new vCPU's own thread.
    std::shared_ptr<VcpuThread> create_vcpu(std::uint32_t id);

    /// A memslot with fresh memory; `slot` < 0 picks the lowest free number.
    std::shared_ptr<MemoryRegion> add_memory(std::int64_t slot, std::uint64_t gpa, std::uint64_t size,
                                             std::uint32_t flags, const MemoryRequest &request);
    /// The region in a slot. Throws ClosedError when there is none.
    const std::shared_ptr<MemoryRegion> &memory(std::uint32_t slot) const { return memory_.at(slot); }
    void remove_memory(std::uint32_t slot) { memory_.remove(slot); }

    /// Opened at the first call. Throws ClosedError or KvmError.
    const Stats &stats();

    /// vCPUs first (kicked all at once, then joined), then the VM fd, which drops every memslot in one go,
    /// then the memory. Idempotent.
    void close();

  private:
    std::shared_ptr<Fd> fd_;
    std::size_t run_size_;
    MemorySlots memory_;
    bool region2_;
    std::uint32_t slot_limit_;
    std::vector<std::weak_ptr<VcpuThread>> vcpus_;
    std::optional<Stats> stats_;
};

} // namespace nvmx::kvm
