// SPDX-License-Identifier: Apache-2.0
#include "wrap_memory.h"

#include <sys/mman.h>

#include <iterator>
#include <limits>
#include <string>

namespace nvmx::binding {
namespace {

constexpr std::int64_t kMaxSafe = (std::int64_t{1} << 53) - 1;
// linux/mman.h, newer than some C libraries.
constexpr int kPageOut = 21, kPopulateRead = 22, kPopulateWrite = 23;

kvm::MemoryRegion &region(const Napi::CallbackInfo &info) {
    return *handle_argument<kvm::MemoryRegion>(info, 0);
}

std::uint64_t number(const Napi::CallbackInfo &info, std::size_t index, const char *name) {
    return static_cast<std::uint64_t>(integer_argument(info, index, name, 0, kMaxSafe));
}

Napi::Value update(const Napi::CallbackInfo &info) {
    const auto flags = integer_argument(info, 2, "flags", 0, std::numeric_limits<std::uint32_t>::max());
    region(info).update(number(info, 1, "gpa"), static_cast<std::uint32_t>(flags));
    return info.Env().Undefined();
}

Napi::Value swap(const Napi::CallbackInfo &info) {
    region(info).swap(memory_request(info, 1), info[2].ToBoolean());
    return info.Env().Undefined();
}

Napi::Value discard(const Napi::CallbackInfo &info) {
    region(info).memory().discard(number(info, 1, "offset"), number(info, 2, "length"), info[3].ToBoolean());
    return info.Env().Undefined();
}

/// Which advice the argument's number stands for; see lib/kvm/memory.ts.
Napi::Value advise(const Napi::CallbackInfo &info) {
    static constexpr int advices[] = {MADV_DONTNEED,  kPageOut,      kPopulateRead,
                                      kPopulateWrite, MADV_HUGEPAGE, MADV_NOHUGEPAGE};
    const auto advice =
        static_cast<std::size_t>(integer_argument(info, 3, "advice", 0, std::size(advices) - 1));
    region(info).memory().advise(number(info, 1, "offset"), number(info, 2, "length"), advices[advice]);
    return info.Env().Undefined();
}

/// Protection: 0 none, 1 read, 3 read and write.
Napi::Value protect(const Napi::CallbackInfo &info) {
    const auto bits = integer_argument(info, 3, "protection", 0, 3);
    region(info).memory().protect(number(info, 1, "offset"), number(info, 2, "length"),
                                  (bits & 1 ? PROT_READ : 0) | (bits & 2 ? PROT_WRITE : 0));
    return info.Env().Undefined();
}

Napi::Value migrate(const Napi::CallbackInfo &info) {
    const auto offset = number(info, 1, "offset");
    const auto length = number(info, 2, "length");
    const auto node = integer_argument(info, 3, "node", -1, 1023);
    kvm::HostMemory &memory = region(info).memory();
    memory.require_range(offset, length);
    Napi::Int32Array status = Napi::Int32Array::New(info.Env(), length / kvm::kPage);
    memory.migrate(offset, length, static_cast<int>(node), {status.Data(), status.ElementLength()});
    return status;
}

Napi::Value copy_from(const Napi::CallbackInfo &info) {
    region(info).memory().copy_from(handle_argument<kvm::MemoryRegion>(info, 1)->memory(),
                                    info[2].ToBoolean());
    return info.Env().Undefined();
}

Napi::Value clear_dirty_log(const Napi::CallbackInfo &info) {
    region(info).clear_dirty_log(number(info, 1, "firstPage"), number(info, 2, "pages"),
                                 bytes_argument(info, 3));
    return info.Env().Undefined();
}

Napi::Value dirty_log(const Napi::CallbackInfo &info) {
    kvm::MemoryRegion &target = region(info);
    Napi::Uint8Array bitmap = Napi::Uint8Array::New(info.Env(), target.dirty_log_bytes());
    target.dirty_log({bitmap.Data(), bitmap.ElementLength()});
    return bitmap;
}

Napi::Value hva(const Napi::CallbackInfo &info) {
    return Napi::BigInt::New(info.Env(),
                             std::uint64_t{reinterpret_cast<std::uintptr_t>(region(info).mapping()->data())});
}

Napi::Value window(const Napi::CallbackInfo &info) {
    kvm::MemoryRegion &target = region(info);
    const auto offset = number(info, 1, "offset");
    const auto length = number(info, 2, "length");
    if (!target.mapping()->is_permitted(offset, length))
        throw kvm::RangeError(
            "this range is protected, read-only or under userfaultfd: touching it here would "
            "be a fault");
    return array_buffer_over(info.Env(), target.mapping(), offset, length);
}

} // namespace

kvm::MemoryRequest memory_request(const Napi::CallbackInfo &info, std::size_t index) {
    if (info[index].IsUndefined())
        return {};
    if (!info[index].IsArray())
        throw Napi::TypeError::New(info.Env(), "a memory request is an array or undefined");
    const auto fields = info[index].As<Napi::Array>();
    const auto field = [&](std::uint32_t at, std::int64_t low, std::int64_t high) {
        const Napi::Value value = fields.Get(at);
        const double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : -2;
        if (!(number >= static_cast<double>(low) && number <= static_cast<double>(high)))
            throw Napi::RangeError::New(info.Env(), "field " + std::to_string(at) + " of a memory request");
        return static_cast<std::int64_t>(number);
    };
    kvm::MemoryRequest request;
    request.backing = static_cast<kvm::Backing>(field(0, 0, 4));
    request.fd = static_cast<int>(field(1, -1, std::numeric_limits<int>::max()));
    request.offset = static_cast<std::uint64_t>(field(2, 0, kMaxSafe));
    request.page_shift = static_cast<unsigned>(field(3, 12, 30));
    request.huge_pages = static_cast<int>(field(4, -1, 1));
    const auto bits = field(5, 0, 7);
    request.read_only = (bits & 1) != 0;
    request.copy_on_write = (bits & 2) != 0;
    request.guest_mmap = (bits & 4) != 0;
    return request;
}

void define_memory(Napi::Env env, Napi::Object exports) {
    define<update>(env, exports, "regionUpdate");
    define<swap>(env, exports, "regionSwap");
    define<discard>(env, exports, "regionDiscard");
    define<advise>(env, exports, "regionAdvise");
    define<protect>(env, exports, "regionProtect");
    define<migrate>(env, exports, "regionMigrate");
    define<copy_from>(env, exports, "regionCopyFrom");
    define<clear_dirty_log>(env, exports, "regionClearDirtyLog");
    define<dirty_log>(env, exports, "regionDirtyLog");
    define<hva>(env, exports, "regionHva");
    define<window>(env, exports, "regionWindow");
}

} // namespace nvmx::binding
