// SPDX-License-Identifier: Apache-2.0
import { writeSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { probeHost } from '../probe/index.ts';
import { spareWork } from './agent_heap.ts';
import type { RunEvent, Selftest } from './engine/model.ts';
import { runHere } from './engine/runner.ts';
import { type AgentJob, encodeEvent, machineInfo } from './protocol.ts';

/** Of the serial line: 115200 bits a second, ten to a byte. */
const LINE_BYTES_PER_MS = 11.52;
/** What its FIFO holds, and the timer's own grain. */
const FIFO_MS = 3;

/**
 * Runs inside the lab machine: takes a job from the command line, answers with one event a line.
 *
 * @param testsOfJob every test that the job's ids may name
 */
export async function runAgent(testsOfJob: (job: AgentJob) => readonly Selftest[]): Promise<never> {
  spareWork();
  const job = JSON.parse(process.argv[2] ?? '{}') as AgentJob;
  const { ids, settings: _, programs: __, from, ...options } = job;
  const byId = new Map(testsOfJob(job).map((test) => [test.id, test]));
  let outAt = 0;
  const emit = (event: RunEvent): void | Promise<void> => {
    // Not process.stdout: it brings a fifth of the time to the first test along (node:net, node:stream).
    const line = Buffer.from(`${encodeEvent(event)}\n`);
    for (let at = 0; at < line.length; ) at += writeSync(1, line, at);
    const now = performance.now();
    outAt = Math.max(outAt, now) + line.length / LINE_BYTES_PER_MS;
    // A test that brings the machine down would take along what is still in the line's buffer: its name.
    const isRisky = event.event === 'start' && byId.get(event.id)?.hazard === 'host-crash';
    if (isRisky) return sleep(outAt - now + FIFO_MS);
  };
  const probe = probeHost();
  emit({ event: 'machine', machine: machineInfo('lab', probe) });
  const tests = ids.map((id) => byId.get(id)).filter((test) => test !== undefined);
  await runHere(tests, probe, { ...options, disposable: true }, emit, from);
  emit({ event: 'end' });
  // A test that timed out may have left a vCPU running: the machine goes away with this process.
  process.exit(0);
}
