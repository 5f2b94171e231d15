// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { Batch, GuestFault, L1, MissingControlError, VmxError } from '../../lib/guest/index.ts';
import { openKvm, withL1 } from './machine.ts';

async function faultOf(promise: Promise<unknown>): Promise<GuestFault> {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (error instanceof GuestFault) return error;
  throw new Error(`expected a GuestFault, got ${String(error)}`);
}

describe('L1 on the local /dev/kvm', () => {
  test('boots, and a batch is executed in order', (context) =>
    withL1(context, {}, async (l1) => {
      const cpu = l1.cpu(0);
      const page = l1.allocate();
      const results = await cpu.executeAll(
        new Batch()
          .write(page, 8, 0x1122_3344_5566_7788n)
          .read(page, 1)
          .read(page, 2)
          .read(page, 4)
          .read(page, 8),
      );
      expect(results.map((result) => result.values[0])).toEqual([
        0n,
        0x88n,
        0x7788n,
        0x5566_7788n,
        0x1122_3344_5566_7788n,
      ]);
      await cpu.write(page, 2, 0xffff_abcdn);
      expect(Buffer.from(l1.bytes(page, 8)).toString('hex')).toBe('cdab665544332211');
    }));

  test('a full batch takes one KVM_RUN', (context) =>
    withL1(context, {}, async (l1) => {
      const cpu = l1.cpu(0);
      const page = l1.allocate();
      const batch = new Batch();
      for (let i = 0; i < 1024; i += 1) batch.write(page + 4 * i, 4, i);
      expect(() => batch.rdtsc()).toThrow('a batch holds at most 1024 commands');
      const stop = await cpu.start(batch);
      expect(stop.kind).toBe('done');
      expect(new Uint32Array(l1.memory.buffer, page, 1024)).toEqual(
        Uint32Array.from({ length: 1024 }, (_, i) => i),
      );
    }));

  test('a failing command ends the batch unless it is told to keep going', (context) =>
    withL1(context, {}, async (l1) => {
      const cpu = l1.cpu(0);
      const stopped = await cpu.execute(new Batch().rdmsr(0xdead_0000).rdtsc());
      expect(stopped.map((result) => result.status)).toEqual(['fault', 'pending']);
      const finished = await cpu.execute(new Batch().rdmsr(0xdead_0000).keepGoing().rdtsc());
      expect(finished.map((result) => result.status)).toEqual(['fault', 'ok']);
      expect(finished[0]!.values.slice(0, 2)).toEqual([13n, 0n]);
      const unknown = await cpu.execute(new Batch().read(0, 3 as never));
      expect(unknown[0]!.status).toBe('bad-command');
    }));

  test('CPUID is what the host set, with an APIC id for each vCPU', (context) =>
    withL1(context, { vcpus: 2 }, async (l1) => {
      for (const cpu of l1.vcpus) {
        const set = cpu.vcpu.getCpuid();
        for (const leaf of [0, 1, 0x8000_0000, 0x8000_0001]) {
          const entry = set.find((candidate) => candidate.function === leaf && candidate.index === 0);
          if (!entry) continue;
          const { eax, ebx } = await cpu.cpuid(leaf);
          expect([leaf, eax, ebx]).toEqual([leaf, entry.eax, entry.ebx]);
        }
        expect((await cpu.cpuid(1)).ebx >>> 24).toBe(cpu.index);
      }
    }));

  test('MSRs pass both ways between L1 and the host', (context) =>
    withL1(context, {}, async (l1) => {
      const cpu = l1.cpu(0);
      const SYSENTER_ESP = 0x175;
      cpu.vcpu.setMsrs([[SYSENTER_ESP, 0x1234_5678_9abcn]]);
      expect(await cpu.rdmsr(SYSENTER_ESP)).toBe(0x1234_5678_9abcn);
      await cpu.wrmsr(SYSENTER_ESP, 0xfedc_0000n);
      expect(cpu.vcpu.getMsrs([SYSENTER_ESP]).get(SYSENTER_ESP)).toBe(0xfedc_0000n);
    }));

  test('code of the host runs in L1 with its arguments', (context) =>
    withL1(context, {}, async (l1) => {
      // lea (%rdi,%rsi,2), %rax; add %rdx, %rax; ret
      const code = l1.place(Uint8Array.of(0x48, 0x8d, 0x04, 0x77, 0x48, 0x01, 0xd0, 0xc3));
      expect(await l1.cpu(0).call(code, 1, 10, 0x1_0000_0000n)).toBe(0x1_0000_0015n);
    }));

  test('TSC grows', (context) =>
    withL1(context, {}, async (l1) => {
      const [first, second] = await l1.cpu(0).executeAll(new Batch().rdtsc().rdtsc());
      expect(second!.values[0]).toBeGreaterThan(first!.values[0]);
    }));

  for (const [name, vector, errorCode] of [
    ['fault_ud', 6, 0n],
    ['fault_gp', 13, 0n],
    ['fault_pf', 14, 2n],
  ] as const) {
    test(`an exception in L1 is reported with its place: ${name}`, (context) =>
      withL1(context, {}, async (l1) => {
        const cpu = l1.cpu(0);
        const { address } = l1.images.l1.symbol(name);
        const fault = await faultOf(cpu.call(address));
        expect(fault).toMatchObject({ level: 'L1', vector, errorCode });
        expect(fault.symbol?.split('+')[0]).toBe(name);
        expect(fault.line).toMatch(/^guests\/common\/faults\.S:\d+$/);
        expect(fault.message).toContain(`${fault.symbol}, ${fault.line})`);
        if (vector === 14) expect(fault.cr2).toBe(0x40_0000_0000n);
        // and L1 goes on
        expect(await cpu.read(address, 1)).toBe(BigInt(l1.bytes(address, 1)[0]!));
      }));
  }

  test('a fault in code of the host has no symbol', (context) =>
    withL1(context, {}, async (l1) => {
      const code = l1.place(Uint8Array.of(0x90, 0x0f, 0x0b));
      const fault = await faultOf(l1.cpu(0).call(code));
      expect(fault).toMatchObject({
        level: 'L1',
        vector: 6,
        rip: BigInt(code + 1),
        symbol: undefined,
        line: undefined,
      });
    }));

  test('without VMX, an L2 says what is missing', (context) =>
    withL1(context, {}, async (l1) => {
      if ((await l1.cpu(0).cpuid(1)).ecx & (1 << 5))
        return context.skip('this KVM offers VMX: see test/nested');
      const missing = new MissingControlError('VMX');
      await expect(l1.vmxon()).rejects.toThrow(missing);
      await expect(l1.createL2({}, (program) => program.vmcall())).rejects.toThrow(missing);
      return undefined;
    }));

  test('without VMX, VMXON is #UD', (context) =>
    withL1(context, {}, async (l1) => {
      const cpu = l1.cpu(0);
      if ((await cpu.cpuid(1)).ecx & (1 << 5)) return context.skip('this KVM offers VMX: see test/nested');
      const stop = await cpu.start(new Batch().vmxon(cpu.vmxonRegion));
      if (stop.kind === 'kvm-exit' && stop.exit.type === 'internal-error') {
        return context.skip('this KVM runs guests in a software emulator that cannot decode VMXON');
      }
      if (stop.kind !== 'done') throw new Error(`unexpected stop ${stop.kind}`);
      const [result] = stop.results;
      expect(result).toMatchObject({ command: 'VMXON', status: 'fault' });
      expect(result!.values[0]).toBe(6n);
      expect(() => cpu.check(result!)).toThrow(/^#UD in L1 during VMXON at RIP 0x[0-9a-f]+ \(execute\+/);
      return undefined;
    }));

  test('four vCPUs of L1 work at the same time', (context) =>
    withL1(context, { vcpus: 4 }, async (l1) => {
      const page = l1.allocate();
      // Every vCPU waits for its predecessor's word: none can finish before all have started.
      const runs = l1.vcpus.map(({ index }) => {
        const batch = new Batch();
        if (index > 0) batch.spin(page + 8 * (index - 1), 8, index);
        return l1.cpu(index).executeAll(batch.write(page + 8 * index, 8, index + 1));
      });
      await Promise.all(runs);
      expect([...new BigUint64Array(l1.memory.buffer, page, 4)]).toEqual([1n, 2n, 3n, 4n]);
    }));

  test('an abort ends a batch that never would, and it can be continued', (context) =>
    withL1(context, {}, async (l1) => {
      const cpu = l1.cpu(0);
      const page = l1.allocate();
      const abort = new AbortController();
      const run = cpu.start(new Batch().spin(page, 4, 1), { signal: abort.signal });
      setTimeout(() => abort.abort(new Error('enough')), 20);
      await expect(run).rejects.toThrow('enough');
      expect(cpu.busy).toBe(true);
      await expect(cpu.rdtsc()).rejects.toThrow('in the middle of a batch');
      l1.bytes(page, 1)[0] = 1;
      expect((await cpu.continue()).kind).toBe('done');
      expect(cpu.busy).toBe(false);
    }));

  test('bad options are refused before anything is made', async (context) => {
    using kvm = openKvm(context);
    await using vm = kvm.createVm();
    await expect(L1.boot(vm, { vcpus: 0 })).rejects.toThrow('between 1 and 64 vCPUs');
    await expect(L1.boot(vm, { memory: 4096 })).rejects.toThrow('at least');
    expect(vm.memory.regions).toHaveLength(0);
    const l1 = await L1.boot(vm, { irqchip: false });
    expect(() => l1.cpu(1)).toThrow('L1 has no vCPU 1: it has 1');
    expect(() => l1.allocate(1e6)).toThrow('boot it with a larger "memory"');
  });
});

test('a VMX failure says which', () => {
  expect(new VmxError('VMRESUME', 5).message).toBe(
    'VMRESUME failed in L1: VMfailValid (error 5: VMRESUME with non-launched VMCS)',
  );
  expect(new VmxError('VMREAD', undefined)).toMatchObject({ outcome: 'VMfailInvalid', error: undefined });
});
