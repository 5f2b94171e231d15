// SPDX-License-Identifier: Apache-2.0
import { fileURLToPath } from 'node:url';
import { L1 } from '../../guest/index.ts';
import { Kvm } from '../../kvm/index.ts';

/** Its own path: what a process is started with. */
export const CHILD = fileURLToPath(import.meta.url);

// A process that events_teardown.ts kills: L2 stops once, then runs for ever.
if (process.argv[1] === CHILD) {
  const kvm = Kvm.open();
  const l1 = await L1.boot(kvm.createVm());
  const page = l1.allocate();
  const l2 = await l1.createL2({}, (program) => program.sync(7).spin(page, 8, 1));
  const stop = await l2.enter();
  if (process.argv[2] === 'running') {
    void l2.continue();
    // the spin has begun when the sync is behind L2
    while (l2.progress.executed === 0) await new Promise((resolve) => setTimeout(resolve, 1));
  }
  process.stdout.write(stop.kind === 'sync' && stop.value === 7 ? 'ready\n' : 'wrong\n');
  setInterval(() => {}, 1000);
}
