// SPDX-License-Identifier: Apache-2.0
import { execFileSync } from 'node:child_process';
import { existsSync, writeFileSync } from 'node:fs';
import { measureHere } from './measure.ts';
import type { BenchEvent } from './model.ts';
import { type BenchJob, CHRT, encodeBenchEvent } from './protocol.ts';
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
 * middle of a sample: as a real-time thread this one gives it away only where it waits. Its vCPUs' threads inherit that.
 */
function keepCpu(): void {
  if (!existsSync(CHRT)) {
    emit({
      event: 'note',
      note: `samples may hold time slices of other threads: ${CHRT} is missing outside`,
    });
    return;
  }
  writeFileSync('/proc/sys/kernel/sched_rt_runtime_us', '-1');
  execFileSync(CHRT, ['--fifo', '--pid', '1', String(process.pid)]);
}
