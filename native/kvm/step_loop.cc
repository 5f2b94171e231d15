// SPDX-License-Identifier: Apache-2.0
#include "step_loop.h"

#include "nested_state.h"
#include "uapi.h"

#include <sys/mman.h>

#include <x86intrin.h>

#include <cerrno>

namespace nvmx::kvm {
namespace {

class Runner {
  public:
    Runner(const StepLoop &loop, StepLoopResult &result) : loop_(loop), result_(result) {}

    void check(const Step &step) const {
        const bool wants_vcpu =
            step.kind == StepKind::Run || step.kind == StepKind::GetState || step.kind == StepKind::SetState;
        if (wants_vcpu && loop_.vcpu == nullptr)
            throw RangeError("this step needs a vCPU");
        if (!wants_vcpu && step.region >= loop_.regions.size())
            throw RangeError("a step names a region that was not given");
        const bool is_sweep = step.kind == StepKind::Discard || step.kind == StepKind::UnmapPages;
        if (is_sweep && (step.c == 0 || step.c % kPage != 0 || step.b % step.c != 0))
            throw RangeError("a sweep's pieces must be whole pages and add up to its length");
        if (step.kind > StepKind::SetState)
            throw RangeError("unknown step");
    }

    /// False when the guest did something else than what the step waits for.
    bool perform(const Step &step, std::uint64_t round) {
        switch (step.kind) {
        case StepKind::Run: return run(step.a);
        case StepKind::Discard:
            for (std::uint64_t at = 0; at < step.b; at += step.c)
                region(step).memory().discard(step.a + at, step.c);
            break;
        case StepKind::UnmapPages:
            for (std::uint64_t at = 0; at < step.b; at += step.c)
                region(step).memory().advise(step.a + at, step.c, MADV_DONTNEED);
            break;
        case StepKind::Move: region(step).update(step.a, region(step).flags()); break;
        case StepKind::Replace: region(step).replace(); break;
        case StepKind::Exchange: exchange(region(step), round); break;
        case StepKind::GetState: state_size_ = get_nested_state(loop_.vcpu->idle_vcpu(), loop_.buffer); break;
        case StepKind::SetState:
            set_nested_state(loop_.vcpu->idle_vcpu(), loop_.buffer.first(state_size_));
            break;
        }
        return true;
    }

  private:
    MemoryRegion &region(const Step &step) const { return *loop_.regions[step.region]; }

    bool run(std::uint64_t port) {
        const auto *page = reinterpret_cast<const kvm_run *>(loop_.vcpu->run_page()->data());
        do {
            result_.error = loop_.vcpu->run_here();
        } while (result_.error == EINTR);
        return result_.error == 0 && page->exit_reason == KVM_EXIT_IO && page->io.port == port;
    }

    void exchange(MemoryRegion &target, std::uint64_t round) {
        if (!target.mapping()->is_permitted(0, target.size()))
            throw RangeError(
                "this region is protected, read-only or under userfaultfd: it cannot be touched");
        for (std::uint64_t at = 0; at < target.size(); at += kPage) {
            auto *words = reinterpret_cast<volatile std::uint64_t *>(target.mapping()->data() + at);
            if (words[1] != round)
                result_.wrong++;
            words[0] = round;
        }
    }

    const StepLoop &loop_;
    StepLoopResult &result_;
    std::size_t state_size_ = 0;
};

} // namespace

std::uint64_t timestamp() {
    unsigned aux;
    return __rdtscp(&aux);
}

StepLoopResult run_steps(const StepLoop &loop, std::span<double> times) {
    if (times.size() < loop.rounds * loop.steps.size())
        throw RangeError("there is no room for the times of all steps");
    StepLoopResult result;
    Runner runner(loop, result);
    for (const Step &step : loop.steps)
        runner.check(step);
    double before = static_cast<double>(timestamp());
    for (std::uint64_t round = 1; round <= loop.rounds; round++) {
        for (const Step &step : loop.steps) {
            if (!runner.perform(step, round))
                return result;
            const auto after = static_cast<double>(timestamp());
            times[result.done++] = after - before;
            before = after;
        }
    }
    return result;
}

} // namespace nvmx::kvm
