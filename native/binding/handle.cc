// SPDX-License-Identifier: Apache-2.0
#include "handle.h"

#include <cmath>
#include <new>

namespace nvmx::binding {
namespace {

// Node 20 aborts the process for an external ArrayBuffer above this.
constexpr std::size_t kMaxArrayBuffer = std::size_t{4} << 30;
/// One of so many bytes of guest memory is counted as memory of V8.
constexpr std::size_t kCountedPart = 16;

[[noreturn]] void throw_made(Napi::Env env, const char *kind, std::initializer_list<napi_value> values) {
    std::vector<napi_value> arguments{Napi::String::New(env, kind)};
    arguments.insert(arguments.end(), values);
    const Napi::FunctionReference &make = Environment::of(env).make_error;
    if (make.IsEmpty())
        throw Napi::Error::New(env, kind);
    throw Napi::Error(env, make.Call(arguments));
}

} // namespace

void throw_as_js(Napi::Env env) {
    try {
        throw;
    } catch (const kvm::KvmError &error) {
        throw_made(env, "kvm",
                   {Napi::Number::New(env, error.error), Napi::String::New(env, error.syscall),
                    Napi::String::New(env, error.request), Napi::String::New(env, error.capability)});
    } catch (const kvm::ClosedError &error) {
        throw_made(env, "closed", {Napi::String::New(env, error.what())});
    } catch (const kvm::BusyError &error) {
        throw_made(env, "busy", {Napi::String::New(env, error.what())});
    } catch (const kvm::RangeError &error) {
        throw Napi::RangeError::New(env, error.what());
    } catch (const std::bad_alloc &) {
        throw_made(env, "kvm",
                   {Napi::Number::New(env, ENOMEM), Napi::String::New(env, "malloc"),
                    Napi::String::New(env, ""), Napi::String::New(env, "")});
    } catch (const std::exception &error) {
        throw Napi::Error::New(env, error.what());
    }
}

std::int64_t integer_argument(const Napi::CallbackInfo &info, std::size_t index, const char *name,
                              std::int64_t low, std::int64_t high) {
    const Napi::Value value = info[index];
    if (!value.IsNumber())
        throw Napi::TypeError::New(info.Env(), std::string(name) + " must be a number");
    const double number = value.As<Napi::Number>().DoubleValue();
    if (!(number >= static_cast<double>(low) && number <= static_cast<double>(high)) ||
        std::floor(number) != number)
        throw Napi::RangeError::New(info.Env(), std::string(name) + " must be an integer from " +
                                                    std::to_string(low) + " to " + std::to_string(high));
    return static_cast<std::int64_t>(number);
}

namespace {

/// The memory of a typed array of this type; TypeError for any other value.
template <class T>
std::span<T> elements(const Napi::CallbackInfo &info, std::size_t index, napi_typedarray_type wanted,
                      const char *name) {
    bool is_array = false;
    napi_typedarray_type type;
    void *data;
    std::size_t length;
    if (napi_is_typedarray(info.Env(), info[index], &is_array) == napi_ok && is_array &&
        napi_get_typedarray_info(info.Env(), info[index], &type, &length, &data, nullptr, nullptr) ==
            napi_ok &&
        type == wanted)
        return {static_cast<T *>(data), length};
    throw Napi::TypeError::New(info.Env(), "argument " + std::to_string(index) + " is not " + name);
}

} // namespace

std::span<std::uint8_t> bytes_argument(const Napi::CallbackInfo &info, std::size_t index) {
    return elements<std::uint8_t>(info, index, napi_uint8_array, "a Uint8Array");
}

std::span<std::uint32_t> indices_argument(const Napi::CallbackInfo &info, std::size_t index) {
    return elements<std::uint32_t>(info, index, napi_uint32_array, "a Uint32Array");
}

std::span<std::uint64_t> words_argument(const Napi::CallbackInfo &info, std::size_t index) {
    return elements<std::uint64_t>(info, index, napi_biguint64_array, "a BigUint64Array");
}

Napi::Value array_buffer_over(Napi::Env env, const std::shared_ptr<kvm::Mapping> &mapping, std::size_t offset,
                              std::size_t length) {
    if (length > kMaxArrayBuffer)
        throw kvm::RangeError("an ArrayBuffer can cover at most 4 GiB (0x100000000 bytes), not " +
                              std::to_string(length) + "; use window(offset, length) for a part");
    if (offset > mapping->size() || length > mapping->size() - offset)
        throw kvm::RangeError("offset " + std::to_string(offset) + " + length " + std::to_string(length) +
                              " is beyond the mapping's " + std::to_string(mapping->size()) + " bytes");
    struct Owner {
        std::shared_ptr<kvm::Mapping> mapping;
        std::int64_t uncounted;
    };
    // V8 counts the bytes as memory that a collection would free, and collects after every few VMs. Guest
    // memory is address space until the guest touches it, and closing frees it: only a part is counted.
    auto *owner = new Owner{mapping, static_cast<std::int64_t>(length - length / kCountedPart)};
    const auto buffer = Napi::ArrayBuffer::New(
        env, mapping->data() + offset, length,
        [](Napi::Env environment, void *, Owner *done) {
            Napi::MemoryManagement::AdjustExternalMemory(environment, done->uncounted);
            delete done;
        },
        owner);
    Napi::MemoryManagement::AdjustExternalMemory(env, -owner->uncounted);
    return buffer;
}

Napi::Value call_ioctl(const Napi::CallbackInfo &info, const kvm::Fd &fd, kvm::Scope scope,
                       std::size_t first) {
    const auto table = kvm::ioctls();
    const kvm::Ioctl &row = table[static_cast<std::size_t>(
        integer_argument(info, first, "ioctl", 0, static_cast<int>(table.size()) - 1))];
    if (row.scope != scope)
        throw Napi::TypeError::New(info.Env(), std::string(row.name) + " belongs to another kind of handle");
    int result;
    if (row.argument == kvm::Argument::Struct)
        result = kvm::call(fd, row, bytes_argument(info, first + 1));
    else if (row.argument == kvm::Argument::Value)
        result = kvm::call(fd, row,
                           static_cast<unsigned long>(
                               integer_argument(info, first + 1, "value", 0, (std::int64_t{1} << 53) - 1)));
    else
        result = kvm::call(fd, row);
    return Napi::Number::New(info.Env(), result);
}

Napi::Value describe_stats(Napi::Env env, const kvm::Stats &stats) {
    Napi::Array rows = Napi::Array::New(env, stats.descriptors().size());
    std::uint32_t at = 0;
    for (const kvm::StatDescriptor &stat : stats.descriptors()) {
        Napi::Array row = Napi::Array::New(env, 6);
        row[0u] = stat.name;
        row[1u] = stat.flags;
        row[2u] = static_cast<int>(stat.exponent);
        row[3u] = stat.bucket_size;
        row[4u] = static_cast<double>(stat.index);
        row[5u] = static_cast<double>(stat.count);
        rows[at++] = row;
    }
    return rows;
}

} // namespace nvmx::binding
