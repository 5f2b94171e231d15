// SPDX-License-Identifier: Apache-2.0
import { measureHere } from './measure.ts';
import { type BenchJob, encodeBenchEvent } from './protocol.ts';
import { benches } from './suites/index.ts';

// The measuring process, in the lab machine or pinned to a CPU of the host: takes a job, answers with one event a line.
const job = JSON.parse(process.argv[2] ?? '{}') as BenchJob;
await measureHere(benches, job, (event) => process.stdout.write(`${encodeBenchEvent(event)}\n`));
// Not process.exit: on the host stdout is a pipe, and what was written must be out first.
process.exitCode = 0;
