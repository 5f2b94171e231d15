// SPDX-License-Identifier: Apache-2.0
#include "fd_watcher.h"

#include "kick_signal.h"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>

namespace nvmx::kvm {
namespace {

// No watch has this id: they are counted from 1.
constexpr std::uint64_t kWake = 0;

int checked(int fd, const char *syscall) {
    if (fd < 0)
        throw KvmError(errno, syscall, "");
    return fd;
}

} // namespace

FdWatcher::FdWatcher(Ready ready)
    : epoll_(checked(::epoll_create1(EPOLL_CLOEXEC), "epoll_create1"), "FdWatcher"),
      wake_(checked(::eventfd(0, EFD_CLOEXEC), "eventfd"), "FdWatcher") {
    epoll_event event{EPOLLIN, {.u64 = kWake}};
    checked(::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_.get(), &event), "epoll_ctl");
    sigset_t previous;
    ::pthread_sigmask(SIG_SETMASK, nullptr, &previous);
    mask_signals_for_vcpu_thread();
    thread_ = std::thread([epoll = epoll_.get(), ready = std::move(ready)] {
        ::pthread_setname_np(::pthread_self(), "nvmx-events");
        for (;;) {
            epoll_event event{};
            const int count = ::epoll_wait(epoll, &event, 1, -1);
            if (count < 0 && errno != EINTR)
                return;
            if (count <= 0)
                continue;
            if (event.data.u64 == kWake)
                return;
            ready(event.data.u64);
        }
    });
    ::pthread_sigmask(SIG_SETMASK, &previous, nullptr);
}

FdWatcher::~FdWatcher() {
    const std::uint64_t one = 1;
    if (::write(wake_.get(), &one, sizeof one) == sizeof one)
        thread_.join();
    else
        thread_.detach();
}

void FdWatcher::watch(const Fd &fd, std::uint64_t id) {
    epoll_event event{EPOLLIN | EPOLLONESHOT, {.u64 = id}};
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd.get(), &event) == 0)
        return;
    if (errno != ENOENT)
        throw KvmError(errno, "epoll_ctl", "");
    checked(::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd.get(), &event), "epoll_ctl");
}

void FdWatcher::forget(const Fd &fd) {
    if (fd.is_open())
        ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd.get(), nullptr);
}

} // namespace nvmx::kvm
