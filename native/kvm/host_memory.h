// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fd.h"
#include "mapping.h"

#include <cstdint>
#include <memory>
#include <span>

namespace nvmx::kvm {

inline constexpr std::uint64_t kPage = 4096;

enum class Backing : std::uint8_t { Anonymous, Memfd, Hugetlb, File, GuestMemfd };

/// How to make the memory behind a slot.
struct MemoryRequest {
    Backing backing = Backing::Anonymous;
    /// File: an open descriptor, which is duplicated.
    int fd = -1;
    /// File: where in it; a multiple of the page size.
    std::uint64_t offset = 0;
    /// File: without write permission (the guest's writes then fault; combine with KVM_MEM_READONLY).
    bool read_only = false;
    /// File: MAP_PRIVATE, so that writes stay here.
    bool copy_on_write = false;
    /// Hugetlb: 21 for 2 MiB pages, 30 for 1 GiB.
    unsigned page_shift = 21;
    /// Anonymous and Memfd: MADV_HUGEPAGE (1), MADV_NOHUGEPAGE (0) or the system's policy (-1).
    int huge_pages = -1;
    /// GuestMemfd: mapped into this process too (GUEST_MEMFD_FLAG_MMAP | INIT_SHARED, Linux 6.18).
    bool guest_mmap = false;
};

void require_aligned(const char *what, std::uint64_t value, std::uint64_t page = kPage);

/// The memory behind one slot: a mapping in this process and, for GuestMemfd, the descriptor KVM reads it
/// from. All ranges are in bytes from its start; a range that is misaligned or too long is a RangeError.
class HostMemory {
  public:
    /// `vm` is asked for KVM_CREATE_GUEST_MEMFD only. Throws RangeError, KvmError.
    HostMemory(const Fd &vm, std::uint64_t size, const MemoryRequest &request);

    /// Null after release().
    const std::shared_ptr<Mapping> &mapping() const { return mapping_; }
    std::uint64_t size() const { return mapping_->size(); }
    Backing backing() const { return request_.backing; }
    const MemoryRequest &request() const { return request_; }
    /// The guest_memfd, or -1.
    int guest_memfd() const;
    bool is_file_backed() const { return request_.backing != Backing::Anonymous && !is_hugetlb(); }

    /// Drops the pages: the next access, the guest's or the host's, sees zeroes. Private memory:
    /// MADV_DONTNEED. memfd: a punched hole (MADV_REMOVE), because MADV_DONTNEED on a shared mapping only
    /// unmaps and the old contents would come back from the page cache. guest_memfd:
    /// fallocate(FALLOC_FL_PUNCH_HOLE), and MADV_DONTNEED of the shared pages unless `only_private`. A file
    /// that is not ours: MADV_DONTNEED, which keeps its contents.
    void discard(std::uint64_t offset, std::uint64_t length, bool only_private = false);
    /// madvise(MADV_DONTNEED), MADV_PAGEOUT, MADV_HUGEPAGE, …
    void advise(std::uint64_t offset, std::uint64_t length, int advice);
    /// mprotect. Anything but PROT_READ | PROT_WRITE closes the range to this process's own views.
    void protect(std::uint64_t offset, std::uint64_t length, int protection);
    /// move_pages(MPOL_MF_MOVE) to `node`, or only asks when `node` < 0. One entry per page: the node it is
    /// on now, or -errno.
    void migrate(std::uint64_t offset, std::uint64_t length, int node, std::span<std::int32_t> status);
    /// Takes over the contents of `source`, which must be as large. Only pages that differ are written; of
    /// fresh memory not even that is read.
    void copy_from(const HostMemory &source, bool is_fresh);

    /// Gives the memory back: unmapped at once when nobody else has the mapping, else retired.
    void release();

    void require_range(std::uint64_t offset, std::uint64_t length) const;

  private:
    bool is_hugetlb() const { return request_.backing == Backing::Hugetlb; }
    std::uint64_t page_size() const { return is_hugetlb() ? std::uint64_t{1} << request_.page_shift : kPage; }
    void map_hugetlb(std::uint64_t size);
    void map_memfd(std::uint64_t size);
    void map_file(std::uint64_t size);
    void map_guest_memfd(const Fd &vm, std::uint64_t size);

    MemoryRequest request_;
    std::unique_ptr<Fd> guest_memfd_;
    std::shared_ptr<Mapping> mapping_;
};

} // namespace nvmx::kvm
