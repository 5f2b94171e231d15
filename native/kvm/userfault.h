// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fd.h"
#include "mapping.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <span>

namespace nvmx::kvm {

/// A userfaultfd over part of a mapping: whoever touches a page that is missing (or, in minor mode, that is
/// in the page cache but not mapped) waits until copy(), zero() or resume() answers. Offsets are from the
/// mapping's start, in whole pages. While it is open the range is closed to this process's own views: the
/// thread that answers must not be the one that waits.
class Userfault {
  public:
    /// Throws KvmError: EPERM without the privilege (CAP_SYS_PTRACE or vm.unprivileged_userfaultfd).
    Userfault(std::shared_ptr<Mapping> mapping, std::uint64_t offset, std::uint64_t length, bool minor);
    Userfault(const Userfault &) = delete;
    Userfault &operator=(const Userfault &) = delete;
    ~Userfault() { close(); }

    const Fd &fd() const { return fd_; }
    bool is_open() const { return fd_.is_open(); }

    struct Fault {
        std::uint64_t offset;
        bool write;
    };
    /// The next fault, without waiting.
    std::optional<Fault> read();

    /// UFFDIO_COPY, UFFDIO_ZEROPAGE, UFFDIO_CONTINUE; each wakes the waiters. EEXIST: somebody filled it
    /// before.
    void copy(std::uint64_t offset, std::span<const std::uint8_t> bytes);
    void zero(std::uint64_t offset, std::uint64_t length);
    void resume(std::uint64_t offset, std::uint64_t length);

    /// Faults are the kernel's business again, and waiters go on. Idempotent.
    void close();

  private:
    std::uint64_t address(std::uint64_t offset, std::uint64_t length) const;

    Fd fd_;
    std::shared_ptr<Mapping> mapping_;
    std::uint64_t offset_;
    std::uint64_t length_;
};

} // namespace nvmx::kvm
