// SPDX-License-Identifier: Apache-2.0
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { describeLab, LabError } from '../../lib/lab/index.ts';
import { type RunEvent, runInLabMachine, selftest, type TestResult } from '../../lib/selftest/index.ts';
import { encodeEvent } from '../../lib/selftest/protocol.ts';
import { stock } from '../fixtures.ts';

const lab = describeLab();
if (!lab.possible) console.log(`# SKIP a machine that dies under a test: ${lab.why}`);

const folder = mkdtempSync(join(tmpdir(), 'nvmx-agent-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const named = (id: string, timeoutMs = 1000): ReturnType<typeof selftest> =>
  selftest({
    id,
    title: id,
    requires: [],
    timeoutMs,
    expectations: { any: {} },
    body: async () => ({ observed: {} }),
  });

const machine: RunEvent = {
  event: 'machine',
  machine: {
    kind: 'lab',
    kernel: 'k',
    cpu: 'c',
    parameters: {},
    fingerprint: stock,
  },
};
const passed = (id: string): TestResult => ({
  id,
  verdict: 'pass',
  expectation: 'any',
  evidence: {},
  durationMs: 1,
});

/** An agent that does to the kernel what a test's id says; the kernel and its death are real. */
writeFileSync(
  join(folder, 'agent.js'),
  `const { writeFileSync } = require('node:fs');
const { execSync } = require('node:child_process');
const say = (line) => process.stdout.write(line + '\\n');
const { ids, from } = JSON.parse(process.argv[2]);
setInterval(() => say(${JSON.stringify(encodeEvent({ event: 'heartbeat' }))}), 25);
say(${JSON.stringify(encodeEvent(machine))});
(async () => {
  for (const id of ids.slice(from.index)) {
    if (id !== 'mute') say('@nvmx ' + JSON.stringify({ event: 'start', id, iteration: from.iteration }));
    await new Promise((resolve) => setTimeout(resolve, 50));
    if (id === 'panic' || id === 'mute') writeFileSync('/proc/sysrq-trigger', 'c');
    if (id === 'quit') process.exit(9);
    if (id === 'off') execSync('poweroff -f; sleep 9');
    if (id === 'hang') process.kill(process.pid, 'SIGSTOP');
    say('@nvmx ' + JSON.stringify({ event: 'result', result: { ...${JSON.stringify(passed(''))}, id } }));
  }
  say(${JSON.stringify(encodeEvent({ event: 'end' }))});
  process.exit(0);
})();
`,
);

async function run(ids: string[], append?: string): Promise<{ results: TestResult[]; events: RunEvent[] }> {
  const events: RunEvent[] = [];
  const { results } = await runInLabMachine(
    ids.map((id) => named(id, 200)),
    {
      seed: 1,
      expect: 'auto',
      agent: '/agent/agent.js',
      lab: { files: { '/agent': folder }, ...(append === undefined ? {} : { append }) },
    },
    (event) => events.push(event),
  );
  return { results, events };
}

describe.skipIf(!lab.possible)('a machine that dies under a test', { timeout: 600_000 }, () => {
  test('panic is a crash with the console, the next test gets a fresh machine', async () => {
    const { results, events } = await run(['before', 'panic', 'after']);
    expect(results.map((result) => [result.id, result.verdict])).toEqual([
      ['before', 'pass'],
      ['panic', 'crash'],
      ['after', 'pass'],
    ]);
    expect(results[1]?.reason).toContain('the machine ended: panic');
    expect(results[1]?.reason).toContain('sysrq triggered crash');
    expect(results[1]?.reproduce).toBe('nvmx test panic --machine lab');
    expect(events.filter((event) => event.event === 'machine')).toHaveLength(1);
    expect(events.filter((event) => event.event === 'result')).toHaveLength(3);
  });

  test('the line that names the test is lost with the machine: it is the one behind the last result', async () => {
    const { results } = await run(['before', 'mute', 'mute', 'after']);
    expect(results.map((result) => [result.id, result.verdict])).toEqual([
      ['before', 'pass'],
      ['mute', 'crash'],
      ['mute', 'crash'],
      ['after', 'pass'],
    ]);
  });

  test('what tests say before one that may end the machine is out when it begins', async () => {
    const ids = ['hazard/talkative', 'hazard/panic', 'hazard/after'];
    const program = `import { writeFileSync } from 'node:fs';
import { runAgent } from './agent.js';
import { selftest } from './engine/define.js';
const bodies = {
  'hazard/talkative': async () => ({ observed: {}, evidence: { text: 'x'.repeat(3000) } }),
  'hazard/panic': async () => writeFileSync('/proc/sysrq-trigger', 'c'),
  'hazard/after': async () => ({ observed: {} }),
};
await runAgent(() => Object.entries(bodies).map(([id, body]) => selftest({
  id, title: id, requires: [], expectations: { any: {} }, body, hazard: id === 'hazard/panic' ? 'host-crash' : 'none',
})));
`;
    const { results } = await runInLabMachine(
      ids.map((id) => named(id)),
      { seed: 1, expect: 'auto', lab: { program } },
      () => {},
    );
    expect(results.map((result) => [result.id, result.verdict])).toEqual([
      ['hazard/talkative', 'pass'],
      ['hazard/panic', 'crash'],
      ['hazard/after', 'pass'],
    ]);
    expect(results[0]?.evidence).toMatchObject({ text: 'x'.repeat(3000) });
  });

  test('a machine that says nothing more is stopped: crash; a test process or a machine that ends is an error', async () => {
    const { results } = await run(['hang', 'quit', 'off', 'after']);
    expect(results.map((result) => result.verdict)).toEqual(['crash', 'error', 'error', 'pass']);
    expect(results[0]?.reason).toContain(
      'the machine ended: hang (the program in it gave no sign of life for 5 s)',
    );
    expect(results[1]?.reason).toContain('the test process ended with status 9');
    expect(results[2]?.reason).toContain('the machine ended: powered-off');
  });

  test('a machine that dies before the first test is no verdict but an error', async () => {
    await expect(run(['after'], 'rdinit=/nowhere init=/nowhere')).rejects.toThrow(LabError);
  });
});
