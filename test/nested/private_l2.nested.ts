// SPDX-License-Identifier: Apache-2.0
// Private memory of L1 beneath an L2, which KVM does not claim to support and yet does as far as this says. Needs a
// kernel with CONFIG_KVM_SW_PROTECTED_VM; docs/lab.md says how to build one.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { foldChecksum, type L1, type L2, type L2Stop } from '../../lib/guest/index.ts';
import { Kvm, type MemoryRegion, VM_TYPE } from '../../lib/kvm/index.ts';
import { exitOf, progressOf, syncOf, whyNotPrivate, withL1 } from './machine.ts';

const PAGE = 4096;
const GPA = 0xc000_0000;
/** L2's own address of the same page. */
const ALIAS = 0x8_0000_0000;

function onPrivateL1(name: string, body: (l1: L1, page: MemoryRegion) => Promise<void>): void {
  test(name, (context) => {
    using kvm = Kvm.open();
    const reason = whyNotPrivate(kvm);
    if (reason !== undefined) return context.skip(reason);
    const withPage = (l1: L1) => body(l1, l1.vm.memory.add({ gpa: GPA, size: PAGE, backing: 'guest-memfd' }));
    return withL1({}, withPage, VM_TYPE['sw-protected']);
  });
}

/** An L2 that writes and reads at `address`, with a sync after each access, and stops before the first. */
async function accesses(l1: L1, address: number, options: object): Promise<L2> {
  const l2 = await l1.createL2({ vpid: 5, ...options }, (program) =>
    program
      .sync()
      .write32(address, 0x11)
      .sync()
      .read32(address)
      .sync()
      .write32(address, 0x22)
      .sync()
      .read32(address)
      .sync()
      .read32(address)
      .vmcall(),
  );
  syncOf(await l2.enter());
  return l2;
}

/** An L2 that reaches the page by an address that only L1's EPT knows. */
function aliased(l1: L1): Promise<L2> {
  const ept = l1.createEpt();
  ept.map(ALIAS, GPA);
  const pageTables = l1.createPageTables();
  pageTables.map(ALIAS);
  return accesses(l1, ALIAS, { ept, pageTables });
}

const faulted = (isPrivate: boolean): L2Stop => ({
  kind: 'kvm-exit',
  exit: { type: 'memory-fault', flags: isPrivate ? 8n : 0n, isPrivate, gpa: GPA, size: PAGE, errno: -14 },
});

for (const paging of ['L0’s tables', 'an EPT'] as const) {
  onPrivateL1(`L2 has L1’s private page at its own address, by ${paging}`, async (l1, page) => {
    const l2 = await accesses(l1, GPA, paging === 'an EPT' ? { ept: l1.createEpt() } : {});
    syncOf(await l2.continue());
    l1.vm.setMemoryPrivate(GPA, PAGE, true);
    for (let step = 0; step < 3; step++) syncOf(await l2.continue());
    progressOf(l2, { checksum: foldChecksum([0, 0x22]) });
    assert.equal(page.bytes()[0], 0x11);
    page.discard(0, PAGE, 'private');
    exitOf(await l2.continue(), 'vmcall');
    progressOf(l2, { checksum: foldChecksum([0, 0x22, 0]) });
    assert.equal(page.bytes()[0], 0x11);
  });
}

onPrivateL1('both of a page’s addresses private: L2 has the private page', async (l1, page) => {
  const l2 = await aliased(l1);
  for (const gpa of [GPA, ALIAS]) l1.vm.setMemoryPrivate(gpa, PAGE, true);
  for (let step = 0; step < 4; step++) syncOf(await l2.continue());
  progressOf(l2, { checksum: foldChecksum([0x11, 0x22]) });
  assert.equal(page.bytes()[0], 0);
  for (const gpa of [GPA, ALIAS]) l1.vm.setMemoryPrivate(gpa, PAGE, false);
  exitOf(await l2.continue(), 'vmcall');
  progressOf(l2, { checksum: foldChecksum([0x11, 0x22, 0]) });
});

onPrivateL1(
  'L1’s address alone private: a fault of a shared access, until it is shared again',
  async (l1, page) => {
    const l2 = await aliased(l1);
    syncOf(await l2.continue());
    l1.vm.setMemoryPrivate(GPA, PAGE, true);
    const stop = await l2.continue();
    if (stop.kind === 'sync') {
      // A kernel that asks L1's address, as it should
      progressOf(l2, { checksum: foldChecksum([0]) });
      return;
    }
    // Linux 7.3 asks L2's address whether the access is private, and L1's whether the page is
    assert.deepEqual(stop, faulted(false));
    assert.deepEqual(await l2.continue(), faulted(false));
    l1.vm.setMemoryPrivate(GPA, PAGE, false);
    syncOf(await l2.continue());
    progressOf(l2, { checksum: foldChecksum([0x11]) });
    assert.equal(page.bytes()[0], 0x11);
  },
);

onPrivateL1('L2’s address alone private: nothing until KVM maps the page again', async (l1, page) => {
  const l2 = await aliased(l1);
  syncOf(await l2.continue());
  l1.vm.setMemoryPrivate(ALIAS, PAGE, true);
  syncOf(await l2.continue());
  progressOf(l2, { checksum: foldChecksum([0x11]) });
  page.unmapPages();
  const stop = await l2.continue();
  if (stop.kind === 'kvm-exit') {
    assert.deepEqual(stop, faulted(true));
    l1.vm.setMemoryPrivate(ALIAS, PAGE, false);
    syncOf(await l2.continue());
  } else {
    syncOf(stop);
  }
  assert.equal(page.bytes()[0], 0x22);
});
