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

/// The number of the slot.
Napi::Value add_memory(const Napi::CallbackInfo &info) {
    const auto slot = integer_argument(info, 0, "slot", -1, kMaxU32);
    const auto gpa = static_cast<std::uint64_t>(integer_argument(info, 1, "gpa", 0, kMaxSafe));
    const auto size = static_cast<std::uint64_t>(integer_argument(info, 2, "size", 0, kMaxSafe));
    const auto flags = static_cast<std::uint32_t>(integer_argument(info, 3, "flags", 0, kMaxU32));
    const auto region = bound<kvm::Vm>(info).add_memory(slot, gpa, size, flags, memory_request(info, 4));
    return Napi::Number::New(info.Env(), region->slot());
}

std::uint32_t slot_argument(const Napi::CallbackInfo &info) {
    return static_cast<std::uint32_t>(integer_argument(info, 0, "slot", 0, kMaxU32));
}

Napi::Value remove_memory(const Napi::CallbackInfo &info) {
    bound<kvm::Vm>(info).remove_memory(slot_argument(info));
    return info.Env().Undefined();
}

Napi::Value region(const Napi::CallbackInfo &info) {
    return make_handle(info.Env(), bound<kvm::Vm>(info).memory(slot_argument(info)));
}

Napi::Value make_calls(const Napi::CallbackInfo &info) {
    Napi::Object functions = Napi::Object::New(info.Env());
    define_bound<kvm::Vm, add_memory>(functions, "addMemory", vm(info));
    define_bound<kvm::Vm, remove_memory>(functions, "removeMemory", vm(info));
    define_bound<kvm::Vm, region>(functions, "region", vm(info));
    return functions;
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
    define<make_calls>(env, exports, "vmCalls");
    define<stats>(env, exports, "vmStats");
    define<read_stats>(env, exports, "vmReadStats");
    define<close>(env, exports, "vmClose");
}

} // namespace nvmx::binding
