// SPDX-License-Identifier: Apache-2.0
#include "exit_filter.h"

#include "error.h"
#include "uapi.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace nvmx::kvm {

ExitFilter::ExitFilter(std::vector<ExitRule> rules) : rules_(std::move(rules)), counts_(rules_.size()) {}

bool ExitFilter::absorb(kvm_run *run, std::size_t page_size) {
    ExitRule::Kind kind;
    std::uint64_t address;
    if (run->exit_reason == KVM_EXIT_IO) {
        kind = run->io.direction == KVM_EXIT_IO_IN ? ExitRule::Kind::IoIn : ExitRule::Kind::IoOut;
        address = run->io.port;
    } else if (run->exit_reason == KVM_EXIT_MMIO) {
        kind = run->mmio.is_write ? ExitRule::Kind::MmioWrite : ExitRule::Kind::MmioRead;
        address = run->mmio.phys_addr;
    } else {
        return false;
    }
    const auto match = std::find_if(rules_.begin(), rules_.end(), [=](const ExitRule &rule) {
        return rule.kind == kind && address >= rule.first && address <= rule.last;
    });
    if (match == rules_.end())
        return false;
    if (kind == ExitRule::Kind::IoIn) {
        auto *data = reinterpret_cast<std::uint8_t *>(run) + run->io.data_offset;
        const std::size_t bytes = std::size_t{run->io.size} * run->io.count;
        if (run->io.data_offset > page_size || bytes > page_size - run->io.data_offset)
            return false;
        for (std::size_t at = 0; at < bytes; at += run->io.size)
            std::memcpy(data + at, &match->answer, run->io.size);
    } else if (kind == ExitRule::Kind::MmioRead) {
        std::memcpy(run->mmio.data, &match->answer, sizeof run->mmio.data);
    }
    std::uint64_t &count = counts_[static_cast<std::size_t>(match - rules_.begin())];
    __atomic_store_n(&count, count + 1, __ATOMIC_RELAXED);
    return true;
}

void ExitFilter::read_counts(std::span<std::uint64_t> out) const {
    if (out.size() < counts_.size())
        throw RangeError("the filter has " + std::to_string(counts_.size()) + " rules, the buffer " +
                         std::to_string(out.size()) + " words");
    for (std::size_t i = 0; i < counts_.size(); i++)
        out[i] = __atomic_load_n(&counts_[i], __ATOMIC_RELAXED);
}

} // namespace nvmx::kvm
