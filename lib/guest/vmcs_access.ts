// SPDX-License-Identifier: Apache-2.0
import { Batch } from './batch.ts';
import { EVMCS_FIELDS, type Evmcs } from './evmcs.ts';
import type { L1Vcpu } from './l1_vcpu.ts';
import type { VmcsAccess } from './vmcs.ts';

/** What the access to an L2's VMCS needs of it. */
export interface VmcsOwner {
  readonly evmcs: Evmcs | undefined;
  readonly cpu: L1Vcpu;
  load(): Promise<void>;
}

/** VMREAD and VMWRITE in L1, loading the VMCS first; or the memory of the enlightened VMCS. */
export function vmcsAccess(owner: VmcsOwner): VmcsAccess {
  return owner.evmcs ? inMemory(owner.evmcs) : byInstructions(owner);
}

function byInstructions(owner: VmcsOwner): VmcsAccess {
  return {
    async read(encodings) {
      await owner.load();
      const batch = new Batch();
      for (const encoding of encodings) batch.vmread(encoding).keepGoing();
      return owner.cpu.execute(batch);
    },
    async write(entries) {
      await owner.load();
      await owner.cpu.executeAll(new Batch().vmwrites(entries));
    },
    check(result) {
      owner.cpu.check({ command: 'VMREAD', ...result });
    },
  };
}

function inMemory(evmcs: Evmcs): VmcsAccess {
  return {
    async read(encodings) {
      return encodings.map((encoding) =>
        EVMCS_FIELDS.has(encoding)
          ? { status: 'ok', values: [evmcs.read(encoding), 0n, 0n] }
          : { status: 'bad-command', values: [0n, 0n, 0n] },
      );
    },
    async write(entries) {
      for (const [encoding, value] of entries) evmcs.write(encoding, BigInt(value));
    },
    check({ status }, encoding) {
      if (status !== 'ok') {
        throw new RangeError(`an enlightened VMCS has no field 0x${encoding.toString(16)}`);
      }
    },
  };
}
