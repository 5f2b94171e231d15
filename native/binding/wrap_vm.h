// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "handle.h"

namespace nvmx::binding {

template <> struct HandleType<kvm::Vm> {
    static constexpr const char *name = "Vm";
    static constexpr napi_type_tag tag{0x1e64b7d9032f4ac8, 0xb5f7426c8ad913e0};
};

void define_vm(Napi::Env env, Napi::Object exports);

} // namespace nvmx::binding
