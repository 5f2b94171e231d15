// SPDX-License-Identifier: Apache-2.0
import { writeSync } from 'node:fs';
import { probeHost } from '../probe/index.ts';
import type { RunEvent } from './engine/model.ts';
import { testsOf } from './engine/parameters.ts';
import { runHere } from './engine/runner.ts';
import { programTests } from './kselftest/index.ts';
import { type AgentJob, encodeEvent, machineInfo } from './protocol.ts';
import { suites } from './suites/index.ts';

// Runs inside the lab machine: takes a job from the command line, answers with one event a line.
const { ids, settings, programs, from, ...options } = JSON.parse(process.argv[2] ?? '{}') as AgentJob;
const emit = (event: RunEvent): void => {
  // Not process.stdout: it brings a fifth of the time to the first test along (node:net, node:stream).
  const line = Buffer.from(`${encodeEvent(event)}\n`);
  for (let at = 0; at < line.length; ) at += writeSync(1, line, at);
};
const probe = probeHost();
emit({ event: 'machine', machine: machineInfo('lab', probe) });
const all = programs ? programTests(programs) : testsOf(suites, settings);
const byId = new Map(all.map((test) => [test.id, test]));
const tests = ids.map((id) => byId.get(id)).filter((test) => test !== undefined);
await runHere(tests, probe, { ...options, disposable: true }, emit, from);
emit({ event: 'end' });
// A test that timed out may have left a vCPU running: the machine goes away with this process.
process.exit(0);
