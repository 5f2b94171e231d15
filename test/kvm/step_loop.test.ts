// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { Kvm, runSteps, UnexpectedExitError } from '../../lib/kvm/index.ts';

const PAGE = 4096;

function machine() {
  const kvm = Kvm.open();
  const vm = kvm.createVm();
  return { kvm, vm, [Symbol.dispose]: () => kvm.close() };
}

describe('runSteps', () => {
  test('performs every step of every round and takes the time of each', () => {
    using m = machine();
    const region = m.vm.memory.add({ gpa: 0x10_0000, size: 8 * PAGE });
    const bytes = new Uint8Array(region.buffer);
    bytes.fill(7);
    const { times } = runSteps(
      undefined,
      [
        { kind: 'discard', region, offset: PAGE, length: 2 * PAGE, piece: PAGE },
        { kind: 'move', region, gpa: 0x20_0000 },
        { kind: 'replace', region },
        { kind: 'move', region, gpa: 0x10_0000 },
      ],
      5,
    );
    expect(times.length).toBe(20);
    expect([...times].filter((time) => !(time > 0))).toEqual([]);
    expect(region.gpa).toBe(0x10_0000);
    expect([bytes[0], bytes[PAGE], bytes[2 * PAGE], bytes[3 * PAGE]]).toEqual([7, 0, 0, 7]);
  });

  test('exchange counts the words that are not the number of the round', () => {
    using m = machine();
    const region = m.vm.memory.add({ gpa: 0, size: 4 * PAGE });
    const words = new BigUint64Array(region.buffer);
    for (let page = 0; page < 4; page += 1) words[(page * PAGE) / 8 + 1] = 2n;
    const { wrong } = runSteps(undefined, [{ kind: 'exchange', region }], 3);
    expect(wrong).toBe(8); // rounds 1 and 3
    expect(words[0]).toBe(3n);
  });

  test('ends with the exit that nobody waits for', () => {
    using m = machine();
    const region = m.vm.memory.add({ gpa: 0, size: PAGE });
    new Uint8Array(region.buffer).set([0xe6, 0x10, 0xf4]); // out 0x10, al; hlt
    const vcpu = m.vm.createVcpu(0);
    vcpu.setSregs({ cs: { base: 0n, selector: 0 } });
    vcpu.setRegs({ rip: 0n, rflags: 2n });
    const error = (() => {
      try {
        runSteps(vcpu, [{ kind: 'run', port: 0x10 }], 2);
      } catch (thrown) {
        return thrown as UnexpectedExitError;
      }
    })();
    expect(error).toBeInstanceOf(UnexpectedExitError);
    expect(error?.message).toContain('"hlt" in round 1');
  });

  test('refuses what cannot be before anything happens', () => {
    using m = machine();
    const region = m.vm.memory.add({ gpa: 0, size: 4 * PAGE });
    const bytes = new Uint8Array(region.buffer).fill(1);
    expect(() => runSteps(undefined, [{ kind: 'run', port: 1 }], 1)).toThrow(/needs a vCPU/);
    expect(() => runSteps(undefined, [{ kind: 'discard', region, piece: 3 * PAGE }], 1)).toThrow(/add up/);
    expect(() => runSteps(undefined, [{ kind: 'discard', region, piece: 100 }], 1)).toThrow(RangeError);
    expect(bytes[0]).toBe(1);
    region.delete();
    expect(() => runSteps(undefined, [{ kind: 'replace', region }], 1)).toThrow(/closed/i);
  });
});
