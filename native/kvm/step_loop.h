// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "memory.h"
#include "vcpu_thread.h"

#include <cstdint>
#include <memory>
#include <span>

namespace nvmx::kvm {

/// What one step of a measured loop does; `a`, `b`, `c` are its operands.
enum class StepKind : std::uint64_t {
    Run,        ///< KVM_RUN until the guest writes port `a`; any other exit ends the loop
    Discard,    ///< HostMemory::discard of [a, a + b) in pieces of `c` bytes
    UnmapPages, ///< MADV_DONTNEED, in the same way
    Move,       ///< MemoryRegion::update with guest address `a`, same flags
    Replace,    ///< MemoryRegion::replace
    Exchange,   ///< for each page: count word 1 that is not the round, then write the round to word 0
    GetState,   ///< KVM_GET_NESTED_STATE into the loop's buffer
    SetState,   ///< KVM_SET_NESTED_STATE from what GetState left there
};

struct Step {
    StepKind kind;
    std::uint64_t region;
    std::uint64_t a;
    std::uint64_t b;
    std::uint64_t c;
};

struct StepLoop {
    VcpuThread *vcpu = nullptr;
    std::span<const std::shared_ptr<MemoryRegion>> regions;
    std::span<const Step> steps;
    std::uint64_t rounds = 0;
    /// For nested state; KVM_CAP_NESTED_STATE bytes.
    std::span<std::uint8_t> buffer;
};

struct StepLoopResult {
    /// Steps that were completed: rounds * steps unless the guest did something unexpected.
    std::uint64_t done = 0;
    std::uint64_t wrong = 0;
    /// KVM_RUN's errno when the loop ended early.
    int error = 0;
};

/// The time-stamp counter: exact in an emulator, where nanoseconds would be rounded, and without a call.
std::uint64_t timestamp();

/// Repeats the steps on the calling thread and leaves the nanoseconds (CLOCK_MONOTONIC) of each in `times`,
/// step after step, round after round. Nothing but the calls themselves is between two readings of the clock.
/// A kick or a signal does not end a Run step. Throws RangeError for a step that cannot be, KvmError,
/// ClosedError, BusyError.
StepLoopResult run_steps(const StepLoop &loop, std::span<double> times);

} // namespace nvmx::kvm
