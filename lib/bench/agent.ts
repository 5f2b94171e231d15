// SPDX-License-Identifier: Apache-2.0
import { readdirSync } from 'node:fs';
import { constants, setPriority } from 'node:os';
import { measureHere } from './measure.ts';
import type { BenchEvent } from './model.ts';
import { type BenchJob, encodeBenchEvent } from './protocol.ts';
import { benches } from './suites/index.ts';

// The measuring process, in the lab machine or pinned to a CPU of the host: takes a job, answers with one event a line.
const job = JSON.parse(process.argv[2] ?? '{}') as BenchJob;
const emit = (event: BenchEvent) => process.stdout.write(`${encodeBenchEvent(event)}\n`);
if (job.kind === 'lab') keepCpu();
await measureHere(benches, job, emit);
// Not process.exit: on the host stdout is a pipe, and what was written must be out first.
process.exitCode = 0;

/**
 * The lab has one CPU. Node's other threads would take it for whole time slices, 800 thousand cycles each, in the
 * middle of a sample: so this thread has the highest priority, which its vCPUs' threads inherit, and they the lowest.
 * (As a real-time thread it starved something for good on Linux 6.1.)
 */
function keepCpu(): void {
  setPriority(constants.priority.PRIORITY_HIGHEST);
  for (const thread of readdirSync('/proc/self/task').map(Number)) {
    if (thread !== process.pid) setPriority(thread, constants.priority.PRIORITY_LOW);
  }
}
