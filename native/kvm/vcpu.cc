// SPDX-License-Identifier: Apache-2.0
#include "vcpu.h"

#include "kick_signal.h"
#include "uapi.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>

namespace nvmx::kvm {
namespace {

int create(const Fd &vm, std::uint32_t id) {
    const int fd = ::ioctl(vm.get(), KVM_CREATE_VCPU, static_cast<unsigned long>(id));
    if (fd < 0)
        throw KvmError(errno, "ioctl", "KVM_CREATE_VCPU");
    return fd;
}

std::atomic<std::uint64_t> nanoseconds_in_run{0};

std::uint64_t now() {
    return static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch() /
                                      std::chrono::nanoseconds{1});
}

} // namespace

Vcpu::Vcpu(const Fd &vm, std::uint32_t id, std::size_t run_size)
    : id_(id), fd_(create(vm, id), "Vcpu"), run_(std::make_shared<Mapping>(run_size, MAP_SHARED, fd_.get())) {
}

int Vcpu::run(ExitFilter *filter) {
    const int fd = fd_.get();
    int error;
    const std::uint64_t began = now();
    runner_.store(::gettid(), std::memory_order_seq_cst);
    do {
        // A KVM_RUN that fails early leaves the previous exit in place; it must not be decoded again.
        page()->exit_reason = KVM_EXIT_UNKNOWN;
        error = ::ioctl(fd, KVM_RUN, 0) < 0 ? errno : 0;
    } while (error == 0 && filter && filter->absorb(page(), run_->size()));
    runner_.store(0, std::memory_order_seq_cst);
    nanoseconds_in_run.fetch_add(now() - began, std::memory_order_relaxed);
    return error;
}

std::uint64_t Vcpu::run_nanoseconds() {
    return nanoseconds_in_run.load(std::memory_order_relaxed);
}

int Vcpu::settle() {
    __atomic_store_n(&page()->immediate_exit, 1, __ATOMIC_SEQ_CST);
    const int error = run();
    clear_kick();
    return error;
}

void Vcpu::clear_kick() {
    __atomic_store_n(&page()->immediate_exit, 0, __ATOMIC_SEQ_CST);
}

void Vcpu::kick() {
    if (!fd_.is_open())
        return;
    // Either the runner is already published and the signal ends its KVM_RUN, or it is not and KVM_RUN will
    // see immediate_exit: both sides store before they load.
    // One signal a run: signals queue, and a flood of them would keep the thread from ever reaching KVM_RUN's
    // end.
    if (__atomic_exchange_n(&page()->immediate_exit, 1, __ATOMIC_SEQ_CST) != 0)
        return;
    if (const pid_t runner = runner_.load(std::memory_order_seq_cst))
        send_kick_signal(runner);
}

void Vcpu::close() {
    if (!fd_.is_open())
        return;
    fd_.close();
    run_->retire();
}

} // namespace nvmx::kvm
