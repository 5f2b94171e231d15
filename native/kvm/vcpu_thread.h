// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "dirty_ring.h"
#include "spin.h"
#include "vcpu.h"

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <thread>

namespace nvmx::kvm {

/// The native thread of one vCPU ("nvmx-vcpu0"): it makes KVM_CREATE_VCPU and every asynchronous KVM_RUN.
/// All methods belong to the owner's thread, except kick().
class VcpuThread {
  public:
    /// Called on the vCPU thread with KVM_RUN's errno, 0 for an exit.
    using Completion = std::function<void(int error)>;

    /// Starts the thread and waits until it has created the vCPU. Throws what KVM_CREATE_VCPU threw.
    VcpuThread(std::shared_ptr<Fd> vm, std::uint32_t id, std::size_t run_size);
    VcpuThread(const VcpuThread &) = delete;
    VcpuThread &operator=(const VcpuThread &) = delete;
    ~VcpuThread();

    std::uint32_t id() const;
    const std::shared_ptr<Mapping> &run_page() const;

    /// The vCPU for a state call. Throws ClosedError, or BusyError from submit_run() until finish_run().
    Vcpu &idle_vcpu();
    /// Opened at the first call, which therefore must not happen during a run. Throws ClosedError, BusyError,
    /// KvmError.
    const Stats &stats();

    /// Starts a KVM_RUN on the thread. The owner calls finish_run() when it has seen the completion.
    void submit_run(Completion done);
    /// The same, but when the run is soon over its errno is the answer and `done` is not called. Waits at
    /// most kSpinLimit, and only where that has been worth it.
    std::optional<int> try_run(Completion done);
    void finish_run();
    /// KVM_RUN on the calling thread. Returns 0 or the errno.
    int run_here();
    /// KVM_RUN on the vCPU's thread while the caller waits, kicked after `limit`.
    int run_within(std::chrono::milliseconds limit);

    /// Exits that runs to come absorb; null for none. Throws ClosedError, BusyError.
    void set_filter(std::shared_ptr<ExitFilter> filter);
    const std::shared_ptr<ExitFilter> &filter() const { return filter_; }

    /// Maps the dirty ring: once, and idle. Throws ClosedError, BusyError, KvmError.
    void map_dirty_ring(std::size_t bytes);
    /// Null until map_dirty_ring(). Throws ClosedError.
    DirtyRing *dirty_ring();

    /// Bytes of its XSAVE area; asked for once.
    std::size_t xsave_size();
    void kick();

    bool is_open() const { return open_; }

    /// Kick, join, close the fd. False when the thread did not come back in time (a stuck KVM_RUN): it is
    /// then left behind and closes the vCPU itself if it ever returns. Idempotent.
    bool stop(std::chrono::milliseconds deadline = std::chrono::seconds(3));

  private:
    struct State;
    enum class Asked : int { ForCall = -1, ForAnswer = -2 };

    void submit(Completion done, Asked asked);

    std::shared_ptr<State> state_;
    std::thread thread_;
    SpinHistory history_;
    bool open_ = true;
    bool busy_ = false;
    std::shared_ptr<Fd> vm_;
    std::shared_ptr<ExitFilter> filter_;
    std::unique_ptr<DirtyRing> dirty_ring_;
    std::optional<Stats> stats_;
    std::size_t xsave_size_ = 0;
};

} // namespace nvmx::kvm
