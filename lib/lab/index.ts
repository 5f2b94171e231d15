// SPDX-License-Identifier: Apache-2.0
/** The emulated Intel machine: Bochs with a real Linux kernel and its real kvm_intel. */
export { cacheFolder } from './cache.ts';
export { consoleExcerpt, findDefect } from './console.ts';
export {
  describeLab,
  type Engine,
  fallbackDebianPackages,
  prepareEngine,
  requiredDebianPackages,
} from './engine.ts';
export { LabError } from './errors.ts';
export { type LabKernel, prepareKernel } from './kernel.ts';
export { buildKernel, type KernelBuildOptions, type KernelBuildResult } from './kernel_build.ts';
export { type BuiltKernel, listKernels, removeKernel } from './kernel_store.ts';
export {
  type LabOptions,
  type LabOutcome,
  type LabResult,
  type LabTerminal,
  runCommandInLab,
  runInLab,
} from './machine.ts';
