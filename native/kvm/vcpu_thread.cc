// SPDX-License-Identifier: Apache-2.0
#include "vcpu_thread.h"

#include "kick_signal.h"
#include "xsave.h"

#include <pthread.h>

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
    bool stopping = false;
    bool finished = false;
    Completion pending;
    std::shared_ptr<ExitFilter> filter;
    std::exception_ptr failure;
    std::unique_ptr<Vcpu> vcpu;

    void serve(const Fd &vm, std::uint32_t id, std::size_t run_size);
};

void VcpuThread::State::serve(const Fd &vm, std::uint32_t id, std::size_t run_size) {
    ::pthread_setname_np(::pthread_self(), ("nvmx-vcpu" + std::to_string(id)).substr(0, 15).c_str());
    std::unique_lock lock(mutex);
    try {
        vcpu = std::make_unique<Vcpu>(vm, id, run_size);
    } catch (...) {
        failure = std::current_exception();
        stopping = true;
    }
    created = true;
    changed.notify_all();
    for (;;) {
        // A run that was submitted is always answered, even when stop() came before it started: stop() has
        // kicked, so it ends at once.
        if (pending) {
            const Completion done = std::exchange(pending, nullptr);
            const std::shared_ptr<ExitFilter> absorbing = filter;
            lock.unlock();
            done(vcpu->run(absorbing.get()));
            lock.lock();
        } else if (stopping) {
            break;
        } else {
            changed.wait(lock);
        }
    }
    if (vcpu)
        vcpu->close();
    finished = true;
    changed.notify_all();
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

void VcpuThread::submit_run(Completion done) {
    idle_vcpu().clear_kick();
    busy_ = true;
    const std::lock_guard lock(state_->mutex);
    state_->pending = std::move(done);
    state_->filter = filter_;
    state_->changed.notify_all();
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
