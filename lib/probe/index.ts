// SPDX-License-Identifier: Apache-2.0
export { type Conclusion, conclude } from './conclude.ts';
export {
  type Fingerprint,
  type FingerprintSources,
  fingerprint,
  type PatchFinding,
} from './fingerprint.ts';
export { type CpuProbe, type HostProbe, type KvmProbe, probeDeeply, probeHost } from './host.ts';
export {
  type BehaviourName,
  type Change,
  type KernelKind,
  readSeries,
  type Series,
  SeriesError,
  type SeriesPatch,
  series,
  seriesForLab,
  type Trace,
} from './series.ts';
export { findHidden, findUnmanaged, hiddenMemory, type UnmanagedRange } from './unmanaged.ts';
