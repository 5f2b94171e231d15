// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fd.h"

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace nvmx::kvm {

/// One statistic as the kernel describes it (struct kvm_stats_desc). `index` and `count` are in 64-bit
/// words of the data block.
struct StatDescriptor {
    std::string name;
    std::uint32_t flags;
    std::int16_t exponent;
    std::uint32_t bucket_size;
    std::size_t index;
    std::size_t count;
};

/// KVM_GET_STATS_FD on a VM or a vCPU (KVM_CAP_BINARY_STATS_FD). The descriptors are read once; read() is one
/// pread of the data block. Any thread may use it, also while the vCPU runs.
class Stats {
  public:
    /// `owner` is the VM's or the vCPU's descriptor. Throws KvmError.
    explicit Stats(const Fd &owner);

    const std::vector<StatDescriptor> &descriptors() const { return descriptors_; }
    /// Number of 64-bit words read() needs.
    std::size_t words() const { return words_; }
    void read(std::span<std::uint64_t> out) const;

  private:
    Fd fd_;
    std::vector<StatDescriptor> descriptors_;
    std::size_t words_ = 0;
    std::size_t data_offset_ = 0;
};

} // namespace nvmx::kvm
