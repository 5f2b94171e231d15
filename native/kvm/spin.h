// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>

namespace nvmx::kvm {

/// How long anybody looks for an answer before sleeping. Waking a sleeping core costs tens of microseconds,
/// more than most exits take.
inline constexpr std::chrono::microseconds kSpinLimit{50};

/// Looks again and again until `is_done()`. False: it took longer than `limit`.
template <class Done> bool spin_until(Done is_done, std::chrono::microseconds limit = kSpinLimit) {
    constexpr int kLooks = 16;
    const auto end = std::chrono::steady_clock::now() + limit;
    do {
        for (int look = 0; look < kLooks; look++) {
            if (is_done())
                return true;
            __builtin_ia32_pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return is_done();
}

/// CPUs that the calling thread may use.
inline int allowed_cpus() {
    cpu_set_t set;
    return ::sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

/// One of the CPUs of this process for spinning on: one is always left to whoever has work to do.
class SpinningCpu {
  public:
    explicit SpinningCpu(int cpus) : is_taken_(taken().fetch_add(1, std::memory_order_relaxed) < cpus - 1) {}
    SpinningCpu(const SpinningCpu &) = delete;
    SpinningCpu &operator=(const SpinningCpu &) = delete;
    ~SpinningCpu() { taken().fetch_sub(1, std::memory_order_relaxed); }

    explicit operator bool() const { return is_taken_; }

  private:
    static std::atomic<int> &taken() {
        static std::atomic<int> count{0};
        return count;
    }

    bool is_taken_;
};

/// Whether spinning is worth it, learned from how it went: a failure doubles the pause before the next try,
/// to 255 occasions at most, a success halves it.
class SpinHistory {
  public:
    bool says_yes() {
        if (skip_ == 0)
            return true;
        skip_--;
        return false;
    }
    void learn(bool success) {
        if (success)
            failures_ -= failures_ > 0 ? 1 : 0;
        else
            failures_ += failures_ < 8 ? 1 : 0;
        skip_ = (1u << failures_) - 1;
    }

  private:
    unsigned failures_ = 0;
    unsigned skip_ = 0;
};

} // namespace nvmx::kvm
