// SPDX-License-Identifier: Apache-2.0
import type { Selftest } from './engine/model.ts';
import { SUITE_MODULES } from './suites/index.ts';

/** Its place in the package, where there is no such file. */
export const AGENT_PROGRAM = 'dist/selftest/job.js';

/** The program that runs these tests in the lab machine: the agent, and of the suites those that the tests are of. */
export function agentProgram(tests: readonly Selftest[]): string {
  const names = [...new Set(tests.map((test) => test.id.split('/', 1)[0]!))];
  const used = names.map((name) => [name, ...SUITE_MODULES[name]!] as const);
  return [
    `import { runAgent } from './agent.js';`,
    `import { suitesOf, testsOf } from './engine/parameters.js';`,
    ...used.map(([, module, exported]) => `import { ${exported} } from './suites/${module}.js';`),
    `const suites = suitesOf({ ${used.map(([name, , exported]) => `'${name}': ${exported}`).join(', ')} });`,
    'await runAgent(({ settings }) => testsOf(suites, settings));',
    '',
  ].join('\n');
}

/** The same for programs of the kernel's. */
export const KSELFTEST_PROGRAM = `import { runAgent } from './agent.js';
import { programTests } from './kselftest/program_test.js';
await runAgent(({ programs }) => programTests(programs));
`;

/** What every such program imports: a machine that waits for its job has it loaded. */
export const AGENT_MODULES: readonly string[] = [
  'agent.js',
  'engine/parameters.js',
  'kselftest/program_test.js',
  ...new Set(Object.values(SUITE_MODULES).map(([module]) => `suites/${module}.js`)),
  'agent_waits.js',
].map((name) => `dist/selftest/${name}`);
