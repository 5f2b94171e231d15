// SPDX-License-Identifier: Apache-2.0
#include "vcpu_thread.h"

#include "kick_signal.h"
#include "xsave.h"

#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <csignal>
#include <exception>
#include <future>
#include <mutex>
#include <string>

namespace nvmx::kvm {

/// Shared with the thread, which may outlive its owner when KVM_RUN is stuck.
struct VcpuThread::State {
    std::mutex mutex;
    std::condition_variable changed;
    bool created = false;
    bool finished = false;
    std::exception_ptr failure;
    std::unique_ptr<Vcpu> vcpu;

    // The owner's until it sets `submitted`, then the thread's until it has answered.
    Completion pending;
    std::shared_ptr<ExitFilter> filter;
    std::atomic<bool> submitted{false};
    /// KVM_RUN's errno, or what the owner wants done with it.
    std::atomic<int> answer{static_cast<int>(Asked::ForCall)};

    std::atomic<bool> stopping{false};
    /// The thread must be notified of a submission. Both sides store theirs before they load the other's.
    std::atomic<bool> asleep{false};
    /// When somebody submitted to a sleeping thread.
    std::atomic<std::chrono::steady_clock::time_point> woken_at{};
    const int cpus = allowed_cpus();

    void serve(const Fd &vm, std::uint32_t id, std::size_t run_size);
    void answer_run();
    void wait();

  private:
    bool has_work() const { return submitted || stopping; }
    /// The last submission came soon enough for spinning to meet it.
    bool is_prompt_ = false;
    SpinHistory history_;
};

void VcpuThread::State::serve(const Fd &vm, std::uint32_t id, std::size_t run_size) {
    ::pthread_setname_np(::pthread_self(), ("nvmx-vcpu" + std::to_string(id)).substr(0, 15).c_str());
    {
        const std::lock_guard lock(mutex);
        try {
            vcpu = std::make_unique<Vcpu>(vm, id, run_size);
        } catch (...) {
            failure = std::current_exception();
            stopping = true;
        }
        created = true;
        changed.notify_all();
    }
    for (;;) {
        // A run that was submitted is always answered, even when stop() came before it started: stop() has
        // kicked, so it ends at once.
        if (submitted)
            answer_run();
        else if (stopping)
            break;
        else
            wait();
    }
    const std::lock_guard lock(mutex);
    if (vcpu)
        vcpu->close();
    finished = true;
    changed.notify_all();
}

void VcpuThread::State::answer_run() {
    const Completion done = std::exchange(pending, nullptr);
    const std::shared_ptr<ExitFilter> absorbing = filter;
    submitted = false;
    const int error = vcpu->run(absorbing.get());
    if (answer.exchange(error) == static_cast<int>(Asked::ForCall))
        done(error);
}

void VcpuThread::State::wait() {
    if (is_prompt_ && history_.says_yes()) {
        if (const SpinningCpu cpu(cpus); cpu) {
            is_prompt_ = spin_until([this] { return has_work(); });
            history_.learn(is_prompt_);
            if (is_prompt_)
                return;
        }
    }
    const auto began = std::chrono::steady_clock::now();
    std::unique_lock lock(mutex);
    asleep = true;
    changed.wait(lock, [this] { return has_work(); });
    asleep = false;
    is_prompt_ = submitted && woken_at.load() - began < kSpinLimit;
}

VcpuThread::VcpuThread(std::shared_ptr<Fd> vm, std::uint32_t id, std::size_t run_size)
    : state_(std::make_shared<State>()), vm_(vm) {
    install_kick_signal();
    // The thread must start with its signals masked, or one meant for Node could land here first.
    sigset_t previous;
    ::pthread_sigmask(SIG_SETMASK, nullptr, &previous);
    mask_signals_for_vcpu_thread();
    try {
        thread_ = std::thread(
            [state = state_, vm = std::move(vm), id, run_size] { state->serve(*vm, id, run_size); });
    } catch (...) {
        ::pthread_sigmask(SIG_SETMASK, &previous, nullptr);
        throw KvmError(EAGAIN, "pthread_create", "");
    }
    ::pthread_sigmask(SIG_SETMASK, &previous, nullptr);

    std::unique_lock lock(state_->mutex);
    state_->changed.wait(lock, [this] { return state_->created; });
    if (state_->failure) {
        lock.unlock();
        thread_.join();
        std::rethrow_exception(state_->failure);
    }
}

VcpuThread::~VcpuThread() {
    stop();
}

std::uint32_t VcpuThread::id() const {
    return state_->vcpu->id();
}

const std::shared_ptr<Mapping> &VcpuThread::run_page() const {
    return state_->vcpu->run_page();
}

Vcpu &VcpuThread::idle_vcpu() {
    if (!open_)
        throw ClosedError("Vcpu");
    if (busy_)
        throw BusyError("Vcpu");
    return *state_->vcpu;
}

void VcpuThread::submit(Completion done, Asked asked) {
    idle_vcpu().clear_kick();
    busy_ = true;
    state_->pending = std::move(done);
    state_->filter = filter_;
    state_->answer = static_cast<int>(asked);
    state_->submitted = true;
    if (!state_->asleep)
        return;
    state_->woken_at = std::chrono::steady_clock::now();
    const std::lock_guard lock(state_->mutex);
    state_->changed.notify_all();
}

void VcpuThread::submit_run(Completion done) {
    submit(std::move(done), Asked::ForCall);
}

std::optional<int> VcpuThread::try_run(Completion done) {
    // A thread that sleeps, or that has lost its CPU while it spun, needs longer than this one should stand
    // still.
    constexpr std::chrono::microseconds kPickUp{5};
    if (state_->cpus < 2 || state_->asleep || !history_.says_yes()) {
        submit_run(std::move(done));
        return {};
    }
    submit(std::move(done), Asked::ForAnswer);
    const auto &answer = state_->answer;
    const bool is_here = spin_until([this] { return !state_->submitted; }, kPickUp) &&
                         spin_until([&] { return answer.load() >= 0; });
    history_.learn(is_here);
    int asked = static_cast<int>(Asked::ForAnswer);
    if (is_here || !state_->answer.compare_exchange_strong(asked, static_cast<int>(Asked::ForCall)))
        return answer.load();
    return {};
}

const Stats &VcpuThread::stats() {
    if (!open_)
        throw ClosedError("Vcpu");
    // KVM_GET_STATS_FD waits for the vCPU's mutex; reading an open descriptor does not.
    if (!stats_)
        stats_.emplace(idle_vcpu().fd());
    return *stats_;
}

void VcpuThread::finish_run() {
    busy_ = false;
}

int VcpuThread::run_here() {
    Vcpu &vcpu = idle_vcpu();
    vcpu.clear_kick();
    return vcpu.run(filter_.get());
}

int VcpuThread::run_within(std::chrono::milliseconds limit) {
    auto result = std::make_shared<std::promise<int>>();
    std::future<int> future = result->get_future();
    submit_run([result](int error) { result->set_value(error); });
    if (future.wait_for(limit) == std::future_status::timeout)
        kick();
    const int error = future.get();
    finish_run();
    return error;
}

void VcpuThread::set_filter(std::shared_ptr<ExitFilter> filter) {
    idle_vcpu();
    filter_ = std::move(filter);
}

void VcpuThread::map_dirty_ring(std::size_t bytes) {
    const Fd &fd = idle_vcpu().fd();
    if (!dirty_ring_)
        dirty_ring_ = std::make_unique<DirtyRing>(fd, bytes);
}

DirtyRing *VcpuThread::dirty_ring() {
    if (!open_)
        throw ClosedError("Vcpu");
    return dirty_ring_.get();
}

std::size_t VcpuThread::xsave_size() {
    if (!open_)
        throw ClosedError("Vcpu");
    if (xsave_size_ == 0)
        xsave_size_ = kvm::xsave_size(*vm_);
    return xsave_size_;
}

void VcpuThread::kick() {
    if (open_)
        state_->vcpu->kick();
}

bool VcpuThread::stop(std::chrono::milliseconds deadline) {
    if (!open_)
        return true;
    open_ = false;
    stats_.reset();
    dirty_ring_.reset();
    if (!thread_.joinable())
        return true;
    std::unique_lock lock(state_->mutex);
    state_->stopping = true;
    state_->vcpu->kick();
    state_->changed.notify_all();
    const bool joined = state_->changed.wait_until(lock, std::chrono::system_clock::now() + deadline,
                                                   [this] { return state_->finished; });
    lock.unlock();
    if (joined)
        thread_.join();
    else
        thread_.detach();
    return joined;
}

} // namespace nvmx::kvm
