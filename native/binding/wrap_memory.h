// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "handle.h"

namespace nvmx::binding {

template <> struct HandleType<kvm::MemoryRegion> {
    static constexpr const char *name = "MemoryRegion";
    static constexpr napi_type_tag tag{0x7c93e0a5b4124f6d, 0x8be20d1764fa3c59};
};

/// Argument `index` is [backing, fd, offset, pageShift, hugePages, bits]; bit 0 read-only, 1 copy-on-write,
/// 2 guest_memfd mapped here.
kvm::MemoryRequest memory_request(const Napi::CallbackInfo &info, std::size_t index);

void define_memory(Napi::Env env, Napi::Object exports);

} // namespace nvmx::binding
