// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

namespace nvmx::kvm {

/// The real-time signal that ends a KVM_RUN. Process-wide by nature: its handler does nothing, and without
/// SA_RESTART so that the ioctl returns EINTR.
void install_kick_signal();

/// Blocks every asynchronous signal but the kick in the calling thread: the others belong to Node's threads.
void mask_signals_for_vcpu_thread();

void send_kick_signal(pid_t thread);

} // namespace nvmx::kvm
