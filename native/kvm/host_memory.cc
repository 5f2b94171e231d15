// SPDX-License-Identifier: Apache-2.0
#include "host_memory.h"

#include "uapi.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace nvmx::kvm {
namespace {

// linux/mempolicy.h
constexpr int kMoveOwnPages = 2;
// linux/mman.h; the shift is in the flags' top bits.
constexpr int kHugeShift = 26;

std::string hex(std::uint64_t value) {
    char text[20];
    snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
    return text;
}

} // namespace

void require_aligned(const char *what, std::uint64_t value, std::uint64_t page) {
    if (value % page != 0)
        throw RangeError(std::string(what) + " " + hex(value) + " is not a multiple of the page size (" +
                         hex(page) + ")");
}

HostMemory::HostMemory(const Fd &vm, std::uint64_t size, const MemoryRequest &request) : request_(request) {
    require_aligned("size", size, page_size());
    if (size == 0)
        throw RangeError("size 0: a memory region needs at least one page (" + hex(page_size()) + ")");
    switch (request_.backing) {
    case Backing::Anonymous:
        mapping_ = std::make_shared<Mapping>(size, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
        break;
    case Backing::Memfd: map_memfd(size); break;
    case Backing::Hugetlb: map_hugetlb(size); break;
    case Backing::File: map_file(size); break;
    case Backing::GuestMemfd: map_guest_memfd(vm, size); break;
    }
    request_.fd = -1;
    if (request_.huge_pages >= 0)
        advise(0, size, request_.huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

void HostMemory::release() {
    if (mapping_.use_count() > 1)
        mapping_->retire();
    mapping_.reset();
}

void HostMemory::map_memfd(std::uint64_t size) {
    const int number = ::memfd_create("nvmx-memory", MFD_CLOEXEC);
    if (number < 0)
        throw KvmError(errno, "memfd_create", "");
    const Fd memfd(number, "memfd");
    if (::ftruncate(memfd.get(), static_cast<off_t>(size)) < 0)
        throw KvmError(errno, "ftruncate", "");
    mapping_ = std::make_shared<Mapping>(size, MAP_SHARED | MAP_NORESERVE, memfd.get());
}

void HostMemory::map_hugetlb(std::uint64_t size) {
    // No MAP_NORESERVE: pages that are not there must fail here, not as SIGBUS at the first access.
    const int flags =
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | static_cast<int>(request_.page_shift << kHugeShift);
    try {
        mapping_ = std::make_shared<Mapping>(size, flags, -1);
    } catch (const KvmError &error) {
        throw KvmError(error.error, "mmap", request_.page_shift == 30 ? "hugetlb 1 GiB" : "hugetlb 2 MiB");
    }
}

void HostMemory::map_file(std::uint64_t size) {
    require_aligned("file offset", request_.offset);
    struct stat stat {};
    if (::fstat(request_.fd, &stat) < 0)
        throw KvmError(errno, "fstat", "");
    // A page beyond the end of a file is SIGBUS.
    if (S_ISREG(stat.st_mode) && (request_.offset > static_cast<std::uint64_t>(stat.st_size) ||
                                  size > static_cast<std::uint64_t>(stat.st_size) - request_.offset))
        throw RangeError("the file has " + hex(static_cast<std::uint64_t>(stat.st_size)) + " bytes, offset " +
                         hex(request_.offset) + " + size " + hex(size) + " is beyond its end");
    mapping_ = std::make_shared<Mapping>(size, request_.copy_on_write ? MAP_PRIVATE : MAP_SHARED, request_.fd,
                                         static_cast<std::int64_t>(request_.offset),
                                         request_.read_only ? PROT_READ : PROT_READ | PROT_WRITE);
    // JavaScript has no read-only ArrayBuffer: a store would be SIGSEGV.
    if (request_.read_only)
        mapping_->forbid(0, size);
}

void HostMemory::map_guest_memfd(const Fd &vm, std::uint64_t size) {
    CreateGuestMemfd create{};
    create.size = size;
    create.flags = request_.guest_mmap ? kGuestMemfdMmap | kGuestMemfdInitShared : 0;
    const int number = ::ioctl(vm.get(), kCreateGuestMemfd, &create);
    if (number < 0)
        throw KvmError(errno, "ioctl", "KVM_CREATE_GUEST_MEMFD", "KVM_CAP_GUEST_MEMFD");
    guest_memfd_ = std::make_unique<Fd>(number, "guest_memfd");
    ::fcntl(number, F_SETFD, FD_CLOEXEC);
    // Without the mmap flag the slot still needs an address, for the pages that the guest shares.
    mapping_ = request_.guest_mmap
                   ? std::make_shared<Mapping>(size, MAP_SHARED, number)
                   : std::make_shared<Mapping>(size, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
}

int HostMemory::guest_memfd() const {
    return guest_memfd_ ? guest_memfd_->get() : -1;
}

void HostMemory::require_range(std::uint64_t offset, std::uint64_t length) const {
    require_aligned("offset", offset, page_size());
    require_aligned("length", length, page_size());
    if (offset > size() || length > size() - offset)
        throw RangeError("offset " + hex(offset) + " + length " + hex(length) +
                         " is beyond the region's size " + hex(size()));
}

void HostMemory::advise(std::uint64_t offset, std::uint64_t length, int advice) {
    require_range(offset, length);
    int result;
    do {
        // The populating advices can be interrupted, by a kick of a vCPU for one.
        result = ::madvise(mapping_->data() + offset, length, advice);
    } while (result < 0 && errno == EINTR);
    if (result < 0)
        throw KvmError(errno, "madvise", "");
}

void HostMemory::discard(std::uint64_t offset, std::uint64_t length, bool only_private) {
    if (guest_memfd_) {
        require_range(offset, length);
        if (length > 0 && ::fallocate(guest_memfd_->get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                      static_cast<off_t>(offset), static_cast<off_t>(length)) < 0)
            throw KvmError(errno, "fallocate", "");
        if (request_.guest_mmap || only_private)
            return;
    }
    advise(offset, length, request_.backing == Backing::Memfd ? MADV_REMOVE : MADV_DONTNEED);
}

void HostMemory::protect(std::uint64_t offset, std::uint64_t length, int protection) {
    require_range(offset, length);
    if (::mprotect(mapping_->data() + offset, length, protection) < 0)
        throw KvmError(errno, "mprotect", "");
    if (protection == (PROT_READ | PROT_WRITE))
        mapping_->permit(offset, length);
    else
        mapping_->forbid(offset, length);
}

void HostMemory::migrate(std::uint64_t offset, std::uint64_t length, int node,
                         std::span<std::int32_t> status) {
    require_range(offset, length);
    const std::size_t count = length / kPage;
    if (status.size() < count)
        throw RangeError("the status needs an entry per page");
    constexpr std::size_t kBatch = 1024;
    for (std::size_t done = 0; done < count; done += kBatch) {
        const std::size_t batch = std::min(kBatch, count - done);
        void *pages[kBatch];
        int nodes[kBatch];
        for (std::size_t i = 0; i < batch; i++)
            pages[i] = mapping_->data() + offset + (done + i) * kPage;
        std::fill_n(nodes, batch, node);
        static_assert(sizeof(int) == sizeof(std::int32_t));
        if (::syscall(SYS_move_pages, 0, batch, pages, node < 0 ? nullptr : nodes, status.data() + done,
                      kMoveOwnPages) < 0)
            throw KvmError(errno, "move_pages", "");
    }
}

void HostMemory::copy_from(const HostMemory &source, bool is_fresh) {
    if (source.size() != size())
        throw RangeError("only memory of the same size can be copied");
    if (!source.mapping_->is_permitted(0, size()) || !mapping_->is_permitted(0, size()))
        throw RangeError("memory that is protected or under userfaultfd cannot be copied");
    static constexpr std::uint8_t zeroes[kPage] = {};
    for (std::uint64_t at = 0; at < size(); at += kPage)
        if (std::memcmp(source.mapping_->data() + at, is_fresh ? zeroes : mapping_->data() + at, kPage) != 0)
            std::memcpy(mapping_->data() + at, source.mapping_->data() + at, kPage);
}

} // namespace nvmx::kvm
