// SPDX-License-Identifier: Apache-2.0
// Runs every example in turn: in the lab that is one boot.
const examples = {
  'hello-l2': () => import('./hello-l2.ts'),
  'apic-access-discarded': () => import('./apic-access-discarded.ts'),
  'migrate-l2': () => import('./migrate-l2.ts'),
  'save-restore': () => import('./save-restore.ts'),
  evmcs: () => import('./evmcs.ts'),
  'dirty-memory': () => import('./dirty-memory.ts'),
};

for (const [name, run] of Object.entries(examples)) {
  console.log(`== ${name}`);
  await run();
}

export {};
