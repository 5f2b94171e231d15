// SPDX-License-Identifier: Apache-2.0
#include "harness.h"

#include <algorithm>

using namespace nvmx;
using test::Machine;

namespace {

std::uint64_t value(const kvm::Stats &stats, const std::string &name) {
    std::vector<std::uint64_t> words(stats.words());
    stats.read(words);
    for (const kvm::StatDescriptor &stat : stats.descriptors())
        if (stat.name == name)
            return words[stat.index];
    throw std::runtime_error("no statistic " + name);
}

} // namespace

TEST("statistics count HLT exits exactly") {
    Machine machine({0xf4, 0xf4, 0xf4});
    const auto vcpu = machine.vcpu();
    const std::uint64_t before = value(vcpu->stats(), "halt_exits");
    for (int i = 0; i < 3; i++)
        EQUAL(vcpu->run_here(), 0);
    EQUAL(value(vcpu->stats(), "halt_exits"), before + 3);
    value(machine.vm->stats(), "remote_tlb_flush");
}

TEST("statistics of a closed vCPU throw") {
    Machine machine({0xf4});
    const auto vcpu = machine.vcpu();
    std::vector<std::uint64_t> words(1);
    THROWN(kvm::RangeError, vcpu->stats().read(words));
    vcpu->stop();
    THROWN(kvm::ClosedError, vcpu->stats());
}
