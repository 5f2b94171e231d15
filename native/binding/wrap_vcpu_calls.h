// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "wrap_vcpu.h"

namespace nvmx::binding {

/// vcpuCalls(vcpu, buffer): the calls that programs make by the thousand, as functions that know their vCPU:
/// {ioctl(row, argument), ioctls(list, buffer, first, end), runSync(), getRegs(), setRegs()}. No handle is to
/// be checked, and struct kvm_regs stays in the first bytes of a buffer that both sides keep.
Napi::Value make_vcpu_calls(const Napi::CallbackInfo &info);

} // namespace nvmx::binding
