// SPDX-License-Identifier: Apache-2.0
import { buildKernel, listKernels, removeKernel } from '../lab/index.ts';
import { type Command, parse, progress, runVerb, STATUS, UsageError, wholeNumber } from './options.ts';

export const kernelCommand: Command = (args, signal) =>
  runVerb('kernel', { build, list, rm: remove }, args, signal);

async function build(args: string[], signal: AbortSignal): Promise<number> {
  const { values, positionals } = parse(args, {
    source: { type: 'string' },
    patch: { type: 'string', multiple: true, default: [] },
    config: { type: 'string', multiple: true, default: [] },
    name: { type: 'string' },
    jobs: { type: 'string' },
    btf: { type: 'boolean', default: false },
    install: { type: 'boolean', default: false },
  });
  if (values.source === undefined) {
    throw new UsageError(
      'kernel build needs --source: a kernel source folder, or debian:linux-source-VERSION',
    );
  }
  const status = progress();
  const { kernel, built, wallMs } = await buildKernel({
    source: values.source,
    // The shell expands --patch *.patch to one option value and the rest as arguments.
    patches: [...values.patch, ...positionals],
    configs: values.config,
    ...(values.name === undefined ? {} : { name: values.name }),
    ...(values.jobs === undefined ? {} : { jobs: wholeNumber('jobs', values.jobs, 1, 512) }),
    btf: values.btf,
    install: values.install,
    signal,
    onProgress: status.show,
    onNotice: (text) => {
      status.clear();
      process.stderr.write(`${text}\n`);
    },
  });
  status.clear();
  const how = built ? `built in ${Math.round(wallMs / 1000)} s` : 'already built from the same contents';
  process.stdout.write(
    `${kernel.name}: Linux ${kernel.release}, ${how}; use it with --kernel ${kernel.name}\n`,
  );
  return STATUS.ok;
}

async function list(args: string[]): Promise<number> {
  const { values, positionals } = parse(args, { json: { type: 'boolean', default: false } });
  if (positionals.length > 0) throw new UsageError('kernel list takes no names');
  const kernels = await listKernels({ onProgress: (text) => process.stderr.write(`${text}\n`) });
  if (values.json) {
    process.stdout.write(`${JSON.stringify(kernels, null, 2)}\n`);
    return STATUS.ok;
  }
  if (kernels.length === 0) process.stderr.write('no kernel was built here; nvmx kernel build makes one\n');
  for (const kernel of kernels) {
    const parts = [
      `Linux ${kernel.release}`,
      kernel.source,
      kernel.patches.length === 0
        ? 'no patches'
        : `${kernel.patches.length} patch${kernel.patches.length === 1 ? '' : 'es'}`,
      ...(kernel.btf ? ['BTF'] : []),
      kernel.builtAt.slice(0, 16).replace('T', ' '),
    ];
    process.stdout.write(`${kernel.name}\t${parts.join(' · ')}\n`);
    for (const subject of kernel.patches) process.stdout.write(`\t  ${subject}\n`);
  }
  return STATUS.ok;
}

async function remove(args: string[]): Promise<number> {
  const { positionals } = parse(args, {});
  if (positionals.length === 0)
    throw new UsageError('kernel rm needs the names of kernels; nvmx kernel list');
  for (const name of positionals) await removeKernel(name);
  return STATUS.ok;
}
