// SPDX-License-Identifier: Apache-2.0
#include "event_fd.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>

namespace nvmx::kvm {
namespace {

int open_eventfd(bool semaphore) {
    const int fd = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | (semaphore ? EFD_SEMAPHORE : 0));
    if (fd < 0)
        throw KvmError(errno, "eventfd", "");
    return fd;
}

} // namespace

EventFd::EventFd(bool semaphore) : fd_(open_eventfd(semaphore), "EventFd") {}

void EventFd::signal(std::uint64_t value) {
    if (::write(fd_.get(), &value, sizeof value) < 0)
        throw KvmError(errno, "write", "eventfd");
}

std::optional<std::uint64_t> EventFd::take() {
    std::uint64_t value = 0;
    if (::read(fd_.get(), &value, sizeof value) == sizeof value)
        return value;
    if (errno == EAGAIN)
        return std::nullopt;
    throw KvmError(errno, "read", "eventfd");
}

} // namespace nvmx::kvm
