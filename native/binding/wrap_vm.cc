// SPDX-License-Identifier: Apache-2.0
#include "wrap_vm.h"

#include "wrap_memory.h"
#include "wrap_vcpu.h"

#include <limits>

namespace nvmx::binding {
namespace {

constexpr std::int64_t kMaxSafe = (std::int64_t{1} << 53) - 1;
constexpr std::int64_t kMaxU32 = std::numeric_limits<std::uint32_t>::max();

const std::shared_ptr<kvm::Vm> &vm(const Napi::CallbackInfo &info) {
    return handle_argument<kvm::Vm>(info, 0);
}

Napi::Value ioctl(const Napi::CallbackInfo &info) {
    return call_ioctl(info, vm(info)->fd(), kvm::Scope::Vm);
}

Napi::Value create_vcpu(const Napi::CallbackInfo &info) {
    const auto id = static_cast<std::uint32_t>(integer_argument(info, 1, "id", 0, kMaxU32));
    if (!info[2].IsFunction())
        throw Napi::TypeError::New(info.Env(), "argument 2 is not a function");
    auto thread = vm(info)->create_vcpu(id);
    return make_handle(info.Env(), std::make_shared<VcpuHandle>(info.Env(), std::move(thread),
                                                                info[2].As<Napi::Function>()));
}

Napi::Value add_memory(const Napi::CallbackInfo &info) {
    const auto slot = integer_argument(info, 1, "slot", -1, kMaxU32);
    const auto gpa = static_cast<std::uint64_t>(integer_argument(info, 2, "gpa", 0, kMaxSafe));
    const auto size = static_cast<std::uint64_t>(integer_argument(info, 3, "size", 0, kMaxSafe));
    const auto flags = static_cast<std::uint32_t>(integer_argument(info, 4, "flags", 0, kMaxU32));
    const kvm::MemoryRequest request = memory_request(info, 5);
    // The handle of a deleted region can stand for the new one: an object with a finalizer is a good part of
    // what a memslot costs.
    auto *old = find_handle<kvm::MemoryRegion>(info.Env(), info[6]);
    if (old && (*old)->is_live())
        throw Napi::TypeError::New(info.Env(), "this handle stands for a memory region");
    auto region = vm(info)->add_memory(slot, gpa, size, flags, request);
    if (!old)
        return make_handle(info.Env(), std::move(region));
    *old = std::move(region);
    return info[6];
}

Napi::Value remove_memory(const Napi::CallbackInfo &info) {
    vm(info)->remove_memory(*handle_argument<kvm::MemoryRegion>(info, 1));
    return info.Env().Undefined();
}

Napi::Value stats(const Napi::CallbackInfo &info) {
    return describe_stats(info.Env(), vm(info)->stats());
}

Napi::Value read_stats(const Napi::CallbackInfo &info) {
    vm(info)->stats().read(words_argument(info, 1));
    return info.Env().Undefined();
}

Napi::Value close(const Napi::CallbackInfo &info) {
    vm(info)->close();
    return info.Env().Undefined();
}

} // namespace

void define_vm(Napi::Env env, Napi::Object exports) {
    define<ioctl>(env, exports, "vmIoctl");
    define<create_vcpu>(env, exports, "vmCreateVcpu");
    define<add_memory>(env, exports, "vmAddMemory");
    define<remove_memory>(env, exports, "vmRemoveMemory");
    define<stats>(env, exports, "vmStats");
    define<read_stats>(env, exports, "vmReadStats");
    define<close>(env, exports, "vmClose");
}

} // namespace nvmx::binding
