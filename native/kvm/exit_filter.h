// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

struct kvm_run;

namespace nvmx::kvm {

/// One kind of exit that is answered and counted without leaving native code.
struct ExitRule {
    enum class Kind : std::uint8_t { IoIn, IoOut, MmioRead, MmioWrite };
    Kind kind;
    /// The port or guest address, first and last.
    std::uint64_t first;
    std::uint64_t last;
    /// What a read gives, little-endian; repeated for string instructions.
    std::uint64_t answer;
};

/// The rules of one vCPU, in order: the first that matches answers. The thread in KVM_RUN uses it; anybody
/// may read the counters.
class ExitFilter {
  public:
    explicit ExitFilter(std::vector<ExitRule> rules);

    /// Answers and counts the exit in `run`, whose page has `page_size` bytes. False: the caller's business.
    bool absorb(kvm_run *run, std::size_t page_size);

    std::size_t size() const { return rules_.size(); }
    void read_counts(std::span<std::uint64_t> out) const;

  private:
    std::vector<ExitRule> rules_;
    std::vector<std::uint64_t> counts_;
};

} // namespace nvmx::kvm
