// SPDX-License-Identifier: Apache-2.0
#include "kick_signal.h"

#include "error.h"

#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <mutex>

namespace nvmx::kvm {
namespace {

// Clear of the first real-time signals, which glibc and common tools use.
int kick_signal() {
    return SIGRTMIN + 7;
}

} // namespace

void install_kick_signal() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action {};
        action.sa_handler = [](int) {};
        sigemptyset(&action.sa_mask);
        if (::sigaction(kick_signal(), &action, nullptr) < 0)
            throw KvmError(errno, "sigaction", "");
    });
}

void mask_signals_for_vcpu_thread() {
    sigset_t blocked;
    sigfillset(&blocked);
    for (const int open : {kick_signal(), SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGTRAP, SIGPROF})
        sigdelset(&blocked, open);
    ::pthread_sigmask(SIG_SETMASK, &blocked, nullptr);
}

void send_kick_signal(pid_t thread) {
    ::syscall(SYS_tgkill, ::getpid(), thread, kick_signal());
}

} // namespace nvmx::kvm
