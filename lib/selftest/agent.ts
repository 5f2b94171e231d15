// SPDX-License-Identifier: Apache-2.0
import { writeSync } from 'node:fs';
import { probeHost } from '../probe/index.ts';
import { spareWork } from './agent_heap.ts';
import type { RunEvent, Selftest } from './engine/model.ts';
import { runHere } from './engine/runner.ts';
import { type AgentJob, encodeEvent, machineInfo } from './protocol.ts';

/**
 * Runs inside the lab machine: takes a job from the command line, answers with one event a line.
 *
 * @param testsOfJob every test that the job's ids may name
 */
export async function runAgent(testsOfJob: (job: AgentJob) => readonly Selftest[]): Promise<never> {
  spareWork();
  const job = JSON.parse(process.argv[2] ?? '{}') as AgentJob;
  const { ids, settings: _, programs: __, from, ...options } = job;
  const emit = (event: RunEvent): void => {
    // Not process.stdout: it brings a fifth of the time to the first test along (node:net, node:stream).
    const line = Buffer.from(`${encodeEvent(event)}\n`);
    for (let at = 0; at < line.length; ) at += writeSync(1, line, at);
  };
  const probe = probeHost();
  emit({ event: 'machine', machine: machineInfo('lab', probe) });
  const byId = new Map(testsOfJob(job).map((test) => [test.id, test]));
  const tests = ids.map((id) => byId.get(id)).filter((test) => test !== undefined);
  await runHere(tests, probe, { ...options, disposable: true }, emit, from);
  emit({ event: 'end' });
  // A test that timed out may have left a vCPU running: the machine goes away with this process.
  process.exit(0);
}
