// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fd.h"
#include "mapping.h"

#include <cstdint>
#include <memory>
#include <span>

namespace nvmx::kvm {

/// One vCPU's ring of written pages (KVM_CAP_DIRTY_LOG_RING or _ACQ_REL), mapped from the vCPU fd. One thread
/// harvests; the vCPU may run meanwhile. KVM_RESET_DIRTY_RINGS on the VM then lets the kernel reuse the
/// entries and write-protects the pages again.
class DirtyRing {
  public:
    /// `bytes` is what the capability was enabled with.
    DirtyRing(const Fd &vcpu, std::size_t bytes);
    ~DirtyRing() { mapping_->retire(); }

    /// One entry is two words: address space << 16 | slot, and the page within the slot.
    /// Takes at most out.size() / 2 entries and returns how many.
    std::size_t harvest(std::span<std::uint64_t> out);
    std::size_t entries() const { return entries_; }

  private:
    std::shared_ptr<Mapping> mapping_;
    std::size_t entries_;
    std::uint64_t next_ = 0;
};

} // namespace nvmx::kvm
