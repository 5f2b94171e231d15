// SPDX-License-Identifier: Apache-2.0
import { readdirSync, readFileSync } from 'node:fs';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { describe, expect } from 'vitest';
import { hlt, load, test } from './machine.ts';

setFlagsFromString('--expose-gc');
const gc = runInNewContext('gc') as () => void;

const openFds = () => readdirSync('/proc/self/fd').length;
const mappings = () => readFileSync('/proc/self/maps', 'utf8').split('\n');
/** Of vCPUs and of memfds: given back at close(), not at collection. */
const ours = () => mappings().filter((line) => /kvm-vcpu|nvmx-memory/.test(line)).length;

describe('nothing grows', () => {
  test('over 1,000 VMs created and closed', { timeout: 120_000 }, async ({ kvm }) => {
    const cycle = () => {
      const vm = kvm.createVm();
      const vcpu = load(vm, hlt);
      new Uint8Array(vm.memory.add({ gpa: 0x10000, size: 0x2000, backing: 'memfd' }).buffer)[0] = 1;
      vcpu.runSync();
      vcpu.stats();
      vm.close();
    };
    const collect = async () => {
      for (let i = 0; i < 4; i++) {
        gc();
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
    };
    for (let i = 0; i < 50; i++) cycle();
    await collect();
    const before = { fds: openFds(), mappings: mappings().length };
    for (let i = 0; i < 1000; i++) {
      cycle();
      // What is closed gives its memory back at once, but keeps its addresses until it is collected.
      if (i % 50 === 49) await collect();
    }
    await collect();
    expect(openFds()).toBe(before.fds);
    expect(ours()).toBe(0);
    // Node's own heap comes and goes in some mappings; each VM has four, so a leak would be thousands.
    expect(mappings().length - before.mappings).toBeLessThan(400);
  });

  test('memory above 4 GiB is the guest’s as well', async ({ vm }) => {
    const GiB = 2 ** 30;
    const high = vm.memory.add({ gpa: 4 * GiB, size: 6 * GiB });
    const last = 10 * GiB - 0x1000;
    // Long mode: 2 MiB pages for the first 2 MiB and for those that end at 10 GiB.
    const tables = vm.memory.add({ gpa: 0x2000, size: 0x4000 });
    const words = new BigUint64Array(tables.buffer);
    words[0] = 0x3003n;
    words[512] = 0x4003n;
    words[512 + 9] = 0x5003n;
    words[1024] = 0x83n;
    words[1536 + 511] = BigInt(10 * GiB - 2 ** 21) | 0x83n;
    // MOV AL, [RBX]; OUT 1, AL; MOV [RBX + 1], AL; HLT.
    const vcpu = load(vm, [0x8a, 0x03, 0xe6, 0x01, 0x88, 0x43, 0x01, 0xf4]);
    vcpu.setSregs({
      cr0: 0x8000_0011n,
      cr3: 0x2000n,
      cr4: 0x20n,
      efer: 0x500n,
      cs: { base: 0n, selector: 8, type: 11, present: 1, s: 1, l: 1, db: 0, g: 1, limit: 0xffffffff },
    });
    vcpu.setRegs({ rbx: BigInt(last), rip: 0x1000n, rflags: 2n });
    vm.memory.write(last, Uint8Array.of(0x5a));
    expect(vcpu.translate(BigInt(last))).toMatchObject({ valid: true, physical: BigInt(last) });
    expect(await vcpu.run()).toMatchObject({ type: 'io', data: Uint8Array.of(0x5a) });
    expect(await vcpu.run()).toEqual({ type: 'hlt' });
    expect([...new Uint8Array(high.window(6 * GiB - 0x1000, 2))]).toEqual([0x5a, 0x5a]);
    high.discard(6 * GiB - 0x1000, 0x1000);
    expect([...vm.memory.read(last, 2)]).toEqual([0, 0]);
  });
});
