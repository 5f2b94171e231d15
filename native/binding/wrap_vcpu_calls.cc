// SPDX-License-Identifier: Apache-2.0
#include "wrap_vcpu_calls.h"

#include <linux/kvm.h>

namespace nvmx::binding {
namespace {

struct Calls {
    std::shared_ptr<VcpuHandle> vcpu;
    /// Keeps `regs` alive: JavaScript's buffer, which nobody else has and so nobody detaches.
    Napi::Reference<Napi::ArrayBuffer> buffer;
    std::span<std::uint8_t> regs;
};

const Calls &calls(const Napi::CallbackInfo &info) {
    return bound<Calls>(info);
}

const kvm::Fd &idle_fd(const Napi::CallbackInfo &info) {
    return calls(info).vcpu->thread().idle_vcpu().fd();
}

Napi::Value ioctl(const Napi::CallbackInfo &info) {
    return call_ioctl(info, idle_fd(info), kvm::Scope::Vcpu, 0);
}

/// (list, buffer, first, end): the list as a Uint32Array, three words a request.
Napi::Value ioctls(const Napi::CallbackInfo &info) {
    static_assert(sizeof(kvm::ListedCall) == 3 * sizeof(std::uint32_t));
    const auto words = indices_argument(info, 0);
    const auto length = static_cast<std::int64_t>(words.size() / 3);
    const auto end = integer_argument(info, 3, "end", 0, length);
    const auto first = integer_argument(info, 2, "first", 0, end);
    const std::span list(reinterpret_cast<const kvm::ListedCall *>(words.data()),
                         static_cast<std::size_t>(end));
    const std::size_t done = kvm::call_list(idle_fd(info), kvm::Scope::Vcpu, list, bytes_argument(info, 1),
                                            static_cast<std::size_t>(first));
    return Napi::Number::New(info.Env(), static_cast<double>(done));
}

Napi::Value run_sync(const Napi::CallbackInfo &info) {
    return Napi::Number::New(info.Env(), calls(info).vcpu->thread().run_here());
}

Napi::Value get_regs(const Napi::CallbackInfo &info) {
    static const kvm::Ioctl &row = kvm::ioctl_named(kvm::Scope::Vcpu, "KVM_GET_REGS");
    kvm::call(idle_fd(info), row, calls(info).regs);
    return {};
}

Napi::Value set_regs(const Napi::CallbackInfo &info) {
    static const kvm::Ioctl &row = kvm::ioctl_named(kvm::Scope::Vcpu, "KVM_SET_REGS");
    kvm::call(idle_fd(info), row, calls(info).regs);
    return {};
}

} // namespace

Napi::Value make_vcpu_calls(const Napi::CallbackInfo &info) {
    if (!info[1].IsArrayBuffer())
        throw Napi::TypeError::New(info.Env(), "argument 1 is not an ArrayBuffer");
    auto buffer = info[1].As<Napi::ArrayBuffer>();
    if (buffer.ByteLength() < sizeof(kvm_regs))
        throw Napi::RangeError::New(info.Env(), "the buffer is too short for struct kvm_regs");
    auto shared = std::make_shared<Calls>();
    shared->vcpu = handle_argument<VcpuHandle>(info, 0);
    shared->regs = {static_cast<std::uint8_t *>(buffer.Data()), sizeof(kvm_regs)};
    shared->buffer = Napi::Reference<Napi::ArrayBuffer>::New(buffer, 1);
    Napi::Object functions = Napi::Object::New(info.Env());
    define_bound<Calls, ioctl>(functions, "ioctl", shared);
    define_bound<Calls, ioctls>(functions, "ioctls", shared);
    define_bound<Calls, run_sync>(functions, "runSync", shared);
    define_bound<Calls, get_regs>(functions, "getRegs", shared);
    define_bound<Calls, set_regs>(functions, "setRegs", shared);
    return functions;
}

} // namespace nvmx::binding
