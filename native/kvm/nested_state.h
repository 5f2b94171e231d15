// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "vcpu.h"

#include <cstdint>
#include <span>

namespace nvmx::kvm {

/// KVM_GET_NESTED_STATE on an idle vCPU (KVM_CAP_NESTED_STATE; the capability's value is the largest size).
/// Writes the buffer's size into the header, makes the call and returns the size of the state. A vCPU that
/// has not executed VMXON has a header-only state of 128 bytes. Throws KvmError (E2BIG: buffer too small).
std::size_t get_nested_state(const Vcpu &vcpu, std::span<std::uint8_t> out);

/// KVM_SET_NESTED_STATE. `bytes` is a raw struct kvm_nested_state, header only or with the vmcs12 pages. The
/// size the header claims must be inside the buffer; everything else is the kernel's to judge.
void set_nested_state(const Vcpu &vcpu, std::span<std::uint8_t> bytes);

/// KVM_ENABLE_CAP(KVM_CAP_HYPERV_ENLIGHTENED_VMCS): the eVMCS versions, low | high << 8.
std::uint16_t enable_evmcs(const Vcpu &vcpu);

} // namespace nvmx::kvm
