// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { agentProgram } from '../../lib/selftest/agent_program.ts';
import { suites, testsOf } from '../../lib/selftest/index.ts';
import { SUITE_MODULES } from '../../lib/selftest/suites/index.ts';

const tests = testsOf(suites);

test('each suite is where the table says, and its tests begin with its name', async () => {
  expect(Object.keys(SUITE_MODULES)).toEqual(suites.map((suite) => suite.name));
  for (const [name, [module, exported]] of Object.entries(SUITE_MODULES)) {
    const part = (await import(`../../lib/selftest/suites/${module}.ts`))[exported];
    const suite = suites.find((one) => one.name === name)!;
    const ids = testsOf([suite]).map((one) => one.id);
    expect('tests' in part ? part : testsOf([suite])).toEqual('tests' in part ? suite : part);
    expect(ids.filter((id) => !id.startsWith(`${name}/`))).toEqual([]);
  }
});

test('a program imports the suites of its tests and no others', () => {
  const chosen = tests.filter((one) => /^(l2-switch\/sched|vapic)\//.test(one.id));
  expect([...agentProgram(chosen).matchAll(/suites\/(\w+)\.js/g)].map((found) => found[1])).toEqual([
    'l2_switch',
    'vapic',
  ]);
  expect(agentProgram(tests).match(/suites\/\w+\.js/g)).toHaveLength(suites.length);
});
