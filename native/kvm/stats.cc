// SPDX-License-Identifier: Apache-2.0
#include "stats.h"

#include "uapi.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace nvmx::kvm {
namespace {

// struct kvm_stats_desc without its flexible array, which in C++ would change the size.
struct DescriptorHeader {
    std::uint32_t flags;
    std::int16_t exponent;
    std::uint16_t size;
    std::uint32_t offset;
    std::uint32_t bucket_size;
};
static_assert(sizeof(DescriptorHeader) == 16);

int open_stats(const Fd &owner) {
    const int fd = ::ioctl(owner.get(), KVM_GET_STATS_FD, 0);
    if (fd < 0)
        throw KvmError(errno, "ioctl", "KVM_GET_STATS_FD", "KVM_CAP_BINARY_STATS_FD");
    // Unlike KVM's other descriptors this one is born inheritable, and a child that keeps it keeps the VM.
    ::fcntl(fd, F_SETFD, FD_CLOEXEC);
    return fd;
}

void read_exactly(int fd, void *out, std::size_t size, std::size_t offset) {
    auto *cursor = static_cast<std::uint8_t *>(out);
    while (size > 0) {
        const ssize_t got = ::pread(fd, cursor, size, static_cast<off_t>(offset));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            throw KvmError(got < 0 ? errno : EIO, "pread", "KVM_GET_STATS_FD");
        cursor += got;
        offset += static_cast<std::size_t>(got);
        size -= static_cast<std::size_t>(got);
    }
}

} // namespace

Stats::Stats(const Fd &owner) : fd_(open_stats(owner), "statistics") {
    kvm_stats_header header{};
    read_exactly(fd_.get(), &header, sizeof header, 0);
    data_offset_ = header.data_offset;

    const std::size_t stride = sizeof(DescriptorHeader) + header.name_size;
    std::vector<std::uint8_t> block(stride * header.num_desc);
    read_exactly(fd_.get(), block.data(), block.size(), header.desc_offset);
    for (std::uint32_t i = 0; i < header.num_desc; i++) {
        DescriptorHeader desc{};
        const std::uint8_t *at = block.data() + i * stride;
        std::memcpy(&desc, at, sizeof desc);
        const char *name = reinterpret_cast<const char *>(at + sizeof desc);
        const std::size_t index = desc.offset / sizeof(std::uint64_t);
        descriptors_.push_back({std::string(name, ::strnlen(name, header.name_size)), desc.flags,
                                desc.exponent, desc.bucket_size, index, desc.size});
        words_ = std::max(words_, index + desc.size);
    }
}

void Stats::read(std::span<std::uint64_t> out) const {
    if (out.size() < words_)
        throw RangeError("statistics need " + std::to_string(words_) + " words, the buffer has " +
                         std::to_string(out.size()));
    read_exactly(fd_.get(), out.data(), words_ * sizeof(std::uint64_t), data_offset_);
}

} // namespace nvmx::kvm
