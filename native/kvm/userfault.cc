// SPDX-License-Identifier: Apache-2.0
#include "userfault.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

namespace nvmx::kvm {
namespace {

constexpr std::uint64_t kPageSize = 4096;

int open_userfaultfd(bool minor) {
    const auto number = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
    if (number < 0)
        throw KvmError(errno, "userfaultfd", "");
    uffdio_api api{};
    api.api = UFFD_API;
    api.features = minor ? UFFD_FEATURE_MINOR_SHMEM : 0;
    if (::ioctl(number, UFFDIO_API, &api) < 0) {
        const int error = errno;
        ::close(number);
        throw KvmError(error, "ioctl", "UFFDIO_API");
    }
    return number;
}

template <class Argument>
void answer(const Fd &fd, unsigned long request, Argument &argument, const char *name) {
    // EAGAIN: the process's mappings change under the call (a fork, an mmap); nothing is done yet.
    while (::ioctl(fd.get(), request, &argument) < 0)
        if (errno != EAGAIN && errno != EINTR)
            throw KvmError(errno, "ioctl", name);
}

} // namespace

Userfault::Userfault(std::shared_ptr<Mapping> mapping, std::uint64_t offset, std::uint64_t length, bool minor)
    : fd_(open_userfaultfd(minor), "Userfault"), mapping_(std::move(mapping)), offset_(offset),
      length_(length) {
    uffdio_register range{};
    range.range = {reinterpret_cast<std::uintptr_t>(mapping_->data()) + offset, length};
    range.mode = minor ? UFFDIO_REGISTER_MODE_MINOR : UFFDIO_REGISTER_MODE_MISSING;
    if (::ioctl(fd_.get(), UFFDIO_REGISTER, &range) < 0)
        throw KvmError(errno, "ioctl", "UFFDIO_REGISTER");
    mapping_->forbid(offset, length);
}

std::optional<Userfault::Fault> Userfault::read() {
    const int fd = fd_.get();
    for (;;) {
        uffd_msg message{};
        const ssize_t got = ::read(fd, &message, sizeof message);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN)
            return std::nullopt;
        if (got != sizeof message)
            throw KvmError(got < 0 ? errno : EIO, "read", "userfaultfd");
        if (message.event != UFFD_EVENT_PAGEFAULT)
            continue;
        const std::uint64_t base = reinterpret_cast<std::uintptr_t>(mapping_->data());
        return Fault{(message.arg.pagefault.address - base) & ~(kPageSize - 1),
                     (message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0};
    }
}

std::uint64_t Userfault::address(std::uint64_t offset, std::uint64_t length) const {
    if (offset % kPageSize != 0 || length % kPageSize != 0 || length == 0)
        throw RangeError("faults are answered in whole pages (0x1000)");
    if (offset < offset_ || offset - offset_ > length_ || length > length_ - (offset - offset_))
        throw RangeError("this is outside the range that was registered");
    return reinterpret_cast<std::uintptr_t>(mapping_->data()) + offset;
}

void Userfault::copy(std::uint64_t offset, std::span<const std::uint8_t> bytes) {
    uffdio_copy argument{};
    argument.dst = address(offset, bytes.size());
    argument.src = reinterpret_cast<std::uintptr_t>(bytes.data());
    argument.len = bytes.size();
    answer(fd_, UFFDIO_COPY, argument, "UFFDIO_COPY");
}

void Userfault::zero(std::uint64_t offset, std::uint64_t length) {
    uffdio_zeropage argument{};
    argument.range = {address(offset, length), length};
    answer(fd_, UFFDIO_ZEROPAGE, argument, "UFFDIO_ZEROPAGE");
}

void Userfault::resume(std::uint64_t offset, std::uint64_t length) {
    uffdio_continue argument{};
    argument.range = {address(offset, length), length};
    answer(fd_, UFFDIO_CONTINUE, argument, "UFFDIO_CONTINUE");
}

void Userfault::close() {
    if (!fd_.is_open())
        return;
    uffdio_range range{reinterpret_cast<std::uintptr_t>(mapping_->data()) + offset_, length_};
    ::ioctl(fd_.get(), UFFDIO_UNREGISTER, &range);
    fd_.close();
    mapping_->permit(offset_, length_);
}

} // namespace nvmx::kvm
