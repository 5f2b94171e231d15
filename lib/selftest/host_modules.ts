// SPDX-License-Identifier: Apache-2.0
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync } from 'node:fs';

/** Module parameters, `module.parameter` → value. */
export type Variant = Readonly<Record<string, string>>;

/** This host's KVM cannot be used at all, or not in the way that was asked for. */
export class MachineError extends Error {
  override readonly name = 'MachineError';
}

/** As on a kernel command line: `kvm_intel.ept=0 kvm_intel.vpid=1`. */
export function variantName(variant: Variant): string {
  return Object.entries(variant)
    .map(([name, value]) => `${name}=${value}`)
    .join(' ');
}

/**
 * Every combination of `module.parameter=value,value` texts, the last one changing fastest.
 *
 * @throws MachineError for a text that is not of that form
 */
export function parseMatrix(texts: readonly string[]): Variant[] {
  let variants: Variant[] = [{}];
  for (const text of texts) {
    const match = /^((?:kvm|kvm_intel)\.\w+)=([^\s,]+(?:,[^\s,]+)*)$/.exec(text);
    if (!match) {
      throw new MachineError(`"${text}" is not MODULE.PARAMETER=VALUE,VALUE with MODULE kvm or kvm_intel`);
    }
    const [, name = '', values = ''] = match;
    variants = variants.flatMap((variant) =>
      values.split(',').map((value) => ({ ...variant, [name]: value })),
    );
  }
  return variants;
}

/**
 * Loads kvm and kvm_intel anew with these parameters; disposing brings the old values back.
 *
 * @throws MachineError when that is not possible here, with the reason; the modules are then as they were
 */
export function reloadModules(variant: Variant): Disposable {
  const before = currentParameters();
  for (const name of Object.keys(variant)) {
    if (before[name] === undefined) throw cannot(`there is no parameter ${name}`);
  }
  if (process.getuid?.() !== 0) throw cannot('only root can load modules');
  if (!existsSync('/sys/module/kvm_intel/initstate')) {
    throw cannot(
      existsSync('/sys/module/kvm_intel')
        ? 'kvm_intel is built into this kernel'
        : 'kvm_intel is not loaded on this host',
    );
  }
  const users = readFileSync('/sys/module/kvm_intel/refcnt', 'utf8').trim();
  if (users !== '0') throw cannot(`kvm_intel is in use (${users} users): stop the VMs of this host first`);
  try {
    load(variant);
  } catch (error) {
    restore(before, variant);
    throw error;
  }
  return { [Symbol.dispose]: () => restore(before, variant) };
}

/** Some parameters cannot be given back as they read, so only those that differ after a plain load are given. */
function restore(before: Variant, changed: Variant): void {
  const old = Object.fromEntries(Object.keys(changed).map((name) => [name, before[name] ?? '']));
  load(old);
  const now = currentParameters();
  const different = Object.entries(before).filter(([name, value]) => now[name] !== value);
  if (different.length > 0) load({ ...old, ...Object.fromEntries(different) });
}

function currentParameters(): Record<string, string> {
  const parameters: Record<string, string> = {};
  for (const module of ['kvm', 'kvm_intel']) {
    const folder = `/sys/module/${module}/parameters`;
    if (!existsSync(folder)) continue;
    for (const name of readdirSync(folder)) {
      parameters[`${module}.${name}`] = readFileSync(`${folder}/${name}`, 'utf8').trim();
    }
  }
  return parameters;
}

function cannot(why: string): MachineError {
  return new MachineError(
    `the modules cannot be loaded anew: ${why}; --machine lab boots a machine for each combination`,
  );
}

function load(variant: Variant): void {
  modprobe(['-r', 'kvm_intel']);
  if (existsSync('/sys/module/kvm/initstate')) modprobe(['-r', 'kvm']);
  for (const module of ['kvm', 'kvm_intel']) {
    const parameters = Object.entries(variant)
      .filter(([name]) => name.startsWith(`${module}.`))
      .map(([name, value]) => `${name.slice(module.length + 1)}=${value}`);
    modprobe([module, ...parameters]);
  }
}

function modprobe(args: readonly string[]): void {
  const done = spawnSync('modprobe', args, { encoding: 'utf8' });
  if (done.status !== 0) {
    const why = done.error?.message ?? done.stderr.trim();
    throw new MachineError(
      `modprobe ${args.join(' ')} failed: ${why}; load kvm_intel by hand again if it is gone`,
    );
  }
}
