// SPDX-License-Identifier: Apache-2.0
// All nested tests in one process: in the lab every process start costs seconds.
import './clone.nested.ts';
import './controls.nested.ts';
import './evmcs.nested.ts';
import './guest_debug.nested.ts';
import './guest_memfd.nested.ts';
import './kvm_state.nested.ts';
import './options.nested.ts';
import './private.nested.ts';
import './private_l2.nested.ts';
import './program.nested.ts';
import './run.nested.ts';
import './run_page.nested.ts';
import './schedule.nested.ts';
import './state.nested.ts';
import './switch.nested.ts';
import './vmfail.nested.ts';
