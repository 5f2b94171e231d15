// SPDX-License-Identifier: Apache-2.0
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { foldChecksum, GuestProtocolError, type L1, type L2, type L2Program } from '../../lib/guest/index.ts';
import { exitOf, nestedRuns, progressOf, syncOf, withL1 } from './machine.ts';

const word = (l1: L1, gpa: number) => new DataView(l1.memory.buffer, gpa, 4);

/** Reads a word between two syncs, with 3 exits that L1 skips before each. */
async function reader(l1: L1, options = {}): Promise<{ l2: L2; page: number }> {
  const page = l1.allocate();
  const l2 = await l1.createL2({ vpid: 7, msrBitmap: true, ...options }, (program) => {
    for (const sync of [1, 2]) program.cpuid(0).cpuid(0).cpuid(0).fold(sync).sync(sync).read32(page);
    program.vmcall();
  });
  return { l2, page };
}

const skipping = { policy: { cpuid: 'skip' } } as const;

/** From the first sync to the end, with these words to read; exact counts. */
async function finish(l1: L1, l2: L2, page: number, words: readonly [number, number]): Promise<void> {
  const runs = nestedRuns(l1);
  word(l1, page).setUint32(0, words[0], true);
  assert.equal(syncOf(await l2.continue()), 2);
  word(l1, page).setUint32(0, words[1], true);
  const stop = await l2.continue();
  exitOf(stop, 'vmcall');
  assert.equal(stop.kind === 'exit' && stop.entries, 7);
  assert.equal(nestedRuns(l1) - runs, 3);
  assert.equal(l2.exitCount('cpuid'), 6);
  assert.equal(l2.exitCount('vmcall'), 1);
}

/** Leaves CPUID's values out of the checksum: what was read last and how often is enough. */
const lastRead = (l2: L2) => l2.progress.last;

test('a clone’s L1 and L2 go on as objects of their own, each with its own memory and counts', () =>
  withL1({}, async (l1) => {
    const { l2, page } = await reader(l1);
    assert.equal(syncOf(await l2.enter(skipping)), 1);
    assert.equal(l2.exitCount('cpuid'), 3);
    await using twin = await l1.clone();
    const other = twin.counterpart(l2);
    assert.notEqual(other, l2);
    assert.equal(twin.counterpart(other), other);
    assert.equal(l1.counterpart(other), l2);
    assert.equal(other.progress.checksum, l2.progress.checksum);
    await finish(twin, other, page, [11, 22]);
    assert.equal(lastRead(other), 22n);
    // The original has not moved.
    assert.equal(l2.exitCount('cpuid'), 3);
    assert(l2.entered && !other.entered);
    await finish(l1, l2, page, [33, 44]);
    assert.equal(lastRead(l2), 44n);
    assert.notEqual(other.progress.checksum, l2.progress.checksum);
    // New things in the clone do not touch the original, and both still take commands.
    const fresh = await twin.createL2({}, (program) => program.fold(5).vmcall());
    exitOf(await fresh.enter(), 'vmcall');
    progressOf(fresh, { checksum: foldChecksum([5]), executed: 1 });
    assert.throws(() => l1.counterpart(fresh), RangeError);
    assert.equal(await twin.cpu(0).rdmsr(0x480), await l1.cpu(0).rdmsr(0x480));
    // Nor does L2's next entry, with VMLAUNCH behind it in both.
    assert(other.launched && l2.launched);
    assert.equal(await other.vmread('VIRTUAL_PROCESSOR_ID'), 7n);
  }));

test('the clone has the original’s own EPT, bitmaps and vCPUs, in its own memory', () =>
  withL1({ vcpus: 2 }, async (l1) => {
    const ept = l1.createEpt();
    const page = l1.allocate();
    const program = (p: L2Program) => p.read32(page).rdmsr(0x174).vmcall();
    const l2 = await l1.createL2({ ept, msrBitmap: true, cpu: 1 }, program);
    await using twin = await l1.clone();
    assert.equal(twin.allocate(), l1.allocate());
    const other = twin.counterpart(l2);
    assert.equal(other.cpu, twin.cpu(1));
    assert.equal(other.structures.ept, twin.counterpart(ept));
    assert.notEqual(twin.counterpart(ept), ept);
    twin.counterpart(ept).unmap(page);
    other.msrBitmap!.interceptRead(0x174);
    exitOf(await other.enter(), 'ept-violation');
    exitOf(await l2.enter(), 'vmcall');
    assert.equal(l2.exitCount('rdmsr'), 0);
    twin.counterpart(ept).map(page);
    exitOf(await other.enter(), 'rdmsr');
  }));

test('an L2 on an enlightened VMCS is cloned', (t) =>
  withL1({ evmcs: true }, async (l1) => {
    if (l1.vm.checkExtension('KVM_CAP_HYPERV_ENLIGHTENED_VMCS') === 0) return t.skip('no enlightened VMCS');
    const { l2, page } = await reader(l1, { evmcs: true });
    assert.equal(syncOf(await l2.enter(skipping)), 1);
    await using twin = await l1.clone();
    const other = twin.counterpart(l2);
    await finish(twin, other, page, [1, 2]);
    await finish(l1, l2, page, [3, 4]);
    assert.deepEqual([lastRead(other), lastRead(l2)], [2n, 4n]);
    other.evmcs!.write(0x2010, 5n);
    assert.equal(l2.evmcs!.read(0x2010), 0n);
  }));

test('an L1 is rewound, again and again: the same objects do the same again', () =>
  withL1({}, async (l1) => {
    const { l2, page } = await reader(l1);
    assert.equal(syncOf(await l2.enter(skipping)), 1);
    await using mark = await l1.clone();
    const checksums: bigint[] = [];
    for (const words of [
      [1, 2],
      [8, 9],
      [1, 2],
    ] as const) {
      await finish(l1, l2, page, words);
      checksums.push(l2.progress.checksum);
      const late = await l1.createL2({}, (program) => program.vmcall());
      exitOf(await late.enter(), 'vmcall');
      await l1.rewind(mark);
      assert(l2.entered);
      assert.equal(l2.exitCount('cpuid'), 3);
      await assert.rejects(late.enter(), GuestProtocolError);
    }
    assert.equal(checksums[0], checksums[2]);
    assert.notEqual(checksums[0], checksums[1]);
    // The mark is an L1 like any other, and can take over what the original has become.
    await finish(l1, l2, page, [1, 2]);
    await mark.rewind(l1);
    const marked = mark.counterpart(l2);
    assert.deepEqual(marked.progress, l2.progress);
    assert(!marked.entered);
    l1.vm.memory.add({ gpa: 0xc000_0000, size: 4096 });
    await assert.rejects(l1.rewind(mark), RangeError);
  }));
