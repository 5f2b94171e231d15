// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fd.h"
#include "vcpu.h"

#include <cstddef>
#include <span>

namespace nvmx::kvm {

/// Bytes of a vCPU's XSAVE area: KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) of the VM, at least 4096. It grows when
/// the process asks for more features (AMX), which the kernel allows until the first vCPU is created.
std::size_t xsave_size(const Fd &vm);

/// KVM_GET_XSAVE2 where the kernel has it, else KVM_GET_XSAVE; KVM_SET_XSAVE. The kernel copies `size` bytes,
/// xsave_size(), whatever the request number says, so a smaller buffer is a RangeError.
void get_xsave(const Vcpu &vcpu, std::span<std::uint8_t> out, std::size_t size);
void set_xsave(const Vcpu &vcpu, std::span<std::uint8_t> bytes, std::size_t size);

} // namespace nvmx::kvm
