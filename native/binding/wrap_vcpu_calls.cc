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
    return **static_cast<std::shared_ptr<Calls> *>(info.Data());
}

const kvm::Fd &idle_fd(const Napi::CallbackInfo &info) {
    return calls(info).vcpu->thread().idle_vcpu().fd();
}

Napi::Value ioctl(const Napi::CallbackInfo &info) {
    return call_ioctl(info, idle_fd(info), kvm::Scope::Vcpu, 0);
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

template <Napi::Value (*Body)(const Napi::CallbackInfo &)>
void add(Napi::Object functions, const char *name, const std::shared_ptr<Calls> &calls) {
    auto data = std::make_unique<std::shared_ptr<Calls>>(calls);
    Napi::Function function = Napi::Function::New<guarded<Body>>(functions.Env(), name, data.get());
    function.AddFinalizer([](Napi::Env, std::shared_ptr<Calls> *owner) { delete owner; }, data.get());
    data.release();
    functions.Set(name, function);
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
    add<ioctl>(functions, "ioctl", shared);
    add<run_sync>(functions, "runSync", shared);
    add<get_regs>(functions, "getRegs", shared);
    add<set_regs>(functions, "setRegs", shared);
    return functions;
}

} // namespace nvmx::binding
