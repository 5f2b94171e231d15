// SPDX-License-Identifier: Apache-2.0
import type { CommandResult } from './batch.ts';
import { VMCS_FIELD_NAMES, type VmcsField, vmcsEncoding, vmcsFieldInfo } from './vmcs_fields.ts';

/** A field and what to write to it, known to fit. */
export type VmcsEntry = readonly [encoding: number, value: bigint | number];

/** How the fields of one L2 are reached: VMREAD and VMWRITE in L1, or the memory of an enlightened VMCS. */
export interface VmcsAccess {
  /** One result for each encoding; a field that does not exist is one that is not `ok`. */
  read(encodings: readonly number[]): Promise<Pick<CommandResult, 'status' | 'values'>[]>;
  /** All in one batch, in this order; the first that fails throws. */
  write(entries: readonly VmcsEntry[]): Promise<void>;
  /** Turns a failed read into its error. */
  check(result: Pick<CommandResult, 'status' | 'values'>, field: number): void;
}

/** Values to write, by name. */
export type VmcsValues = { readonly [F in VmcsField]?: bigint | number };

/**
 * The fields of an L2's VMCS by their SDM names. Not while L2 is active: L1 executes the VMREADs. Every call is one
 * batch, whatever the number of fields.
 */
export class Vmcs {
  readonly #access: VmcsAccess;

  /** @internal Made with an L2. */
  constructor(access: VmcsAccess) {
    this.#access = access;
  }

  /** @throws VmxError (12) for a field that this CPU does not have */
  async read(field: VmcsField | number): Promise<bigint> {
    const encoding = vmcsEncoding(field);
    const [result] = await this.#access.read([encoding]);
    this.#access.check(result!, encoding);
    return result!.values[0];
  }

  /** Several fields at once. */
  async readAll<F extends VmcsField>(fields: readonly F[]): Promise<Record<F, bigint>> {
    const results = await this.#access.read(fields.map((field) => vmcsEncoding(field)));
    const values = {} as Record<F, bigint>;
    for (const [i, field] of fields.entries()) {
      this.#access.check(results[i]!, vmcsEncoding(field));
      values[field] = results[i]!.values[0];
    }
    return values;
  }

  /** Every field that this CPU has, in the order of the encodings. */
  async dump(): Promise<Map<VmcsField, bigint>> {
    const results = await this.#access.read(VMCS_FIELD_NAMES.map((field) => vmcsEncoding(field)));
    const values = new Map<VmcsField, bigint>();
    for (const [i, field] of VMCS_FIELD_NAMES.entries()) {
      if (results[i]!.status === 'ok') values.set(field, results[i]!.values[0]);
    }
    return values;
  }

  /** @throws VmxError (12, or 13 for a read-only field where the CPU does not allow that) */
  async write(field: VmcsField | number, value: bigint | number): Promise<void> {
    await this.#access.write([checked(field, value)]);
  }

  /** Several fields, in the order of the object's keys. */
  async writeAll(values: VmcsValues): Promise<void> {
    await this.#access.write(vmcsEntries(values));
  }
}

/** Fields by name as they will be written. @throws RangeError for a value that the field's width cannot hold */
export function vmcsEntries(values: VmcsValues): VmcsEntry[] {
  return (Object.entries(values) as [VmcsField, bigint | number][]).map(([field, value]) =>
    checked(field, value),
  );
}

/** @throws RangeError for a value that the field's width cannot hold */
function checked(field: VmcsField | number, value: bigint | number): VmcsEntry {
  const { encoding, width } = vmcsFieldInfo(field);
  const bits = width === 'natural' ? 64 : width;
  const wanted = BigInt(value);
  if (wanted !== BigInt.asUintN(bits, wanted)) {
    throw new RangeError(`0x${wanted.toString(16)} does not fit into the ${bits} bits of ${String(field)}`);
  }
  return [encoding, wanted];
}
