// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "handle.h"

namespace nvmx::binding {

template <> struct HandleType<kvm::System> {
    static constexpr const char *name = "Kvm";
    static constexpr napi_type_tag tag{0x93d80c5ef1a74b26, 0x8c0e5b92d73f4a61};
};

void define_system(Napi::Env env, Napi::Object exports);

} // namespace nvmx::binding
