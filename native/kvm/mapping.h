// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "error.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace nvmx::kvm {

/// Owner of one mmap. Shared by the object that made it and by every ArrayBuffer over it; munmap happens
/// when the last of them goes away, so no view can ever dangle.
///
/// It also remembers which ranges must not be touched by this process just now, because a load or a store
/// would be a signal (mprotect) or would wait for somebody else (userfaultfd).
class Mapping {
  public:
    Mapping(std::size_t size, int flags, int fd, std::int64_t offset = 0,
            int protection = PROT_READ | PROT_WRITE)
        : size_(size) {
        base_ = ::mmap(nullptr, size, protection, flags, fd, offset);
        if (base_ == MAP_FAILED)
            throw KvmError(errno, "mmap", "");
    }
    Mapping(const Mapping &) = delete;
    Mapping &operator=(const Mapping &) = delete;
    ~Mapping() { ::munmap(base_, size_); }

    std::uint8_t *data() const { return static_cast<std::uint8_t *>(base_); }
    std::size_t size() const { return size_; }

    /// Gives the memory and the mapped file back at once but keeps the address range valid: a mapped
    /// kvm_run page pins the vCPU, and with it the whole VM, in the kernel until it is unmapped, and
    /// garbage collection is too late for that.
    void retire() {
        ::mmap(base_, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
               -1, 0);
        forbidden_.clear();
    }

    void forbid(std::size_t offset, std::size_t length) {
        permit(offset, length);
        if (length > 0)
            forbidden_.push_back({offset, offset + length});
    }
    void permit(std::size_t offset, std::size_t length) {
        const std::size_t end = offset + length;
        std::vector<Range> kept;
        for (const Range &range : forbidden_) {
            if (range.begin < std::min(range.end, offset))
                kept.push_back({range.begin, std::min(range.end, offset)});
            if (std::max(range.begin, end) < range.end)
                kept.push_back({std::max(range.begin, end), range.end});
        }
        forbidden_ = std::move(kept);
    }
    bool is_permitted(std::size_t offset, std::size_t length) const {
        return std::none_of(forbidden_.begin(), forbidden_.end(), [=](const Range &range) {
            return range.begin < offset + length && offset < range.end;
        });
    }

  private:
    struct Range {
        std::size_t begin, end;
    };

    void *base_;
    std::size_t size_;
    std::vector<Range> forbidden_;
};

} // namespace nvmx::kvm
