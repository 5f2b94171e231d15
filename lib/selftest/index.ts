// SPDX-License-Identifier: Apache-2.0
export { selftest } from './engine/define.ts';
export {
  type Expectations,
  type ExpectationTable,
  type Expected,
  type Hazard,
  type MachineInfo,
  type Observations,
  type Observed,
  type Parameter,
  type ParameterValues,
  RESULT_SCHEMA,
  type Requirement,
  type RunEvent,
  type RunReport,
  type Selftest,
  type SelftestContext,
  type Subtest,
  type Suite,
  type Summary,
  summarize,
  type TestResult,
  type Verdict,
} from './engine/model.ts';
export { fixedSuite, parseSetting, SettingError, type Settings, testsOf } from './engine/parameters.ts';
export { seededRandom } from './engine/random.ts';
export { binaryStats, nestedVmx, vmxControl } from './engine/requirements.ts';
export { type Cursor, isFailure, type RunOptions, runHere } from './engine/runner.ts';
export { matchesPattern, select } from './engine/select.ts';
export { compare, type Mismatch, show } from './engine/verdict.ts';
export { MachineError, parseMatrix, reloadModules, type Variant, variantName } from './host_modules.ts';
export {
  discover,
  KselftestError,
  namesOf,
  type Program,
  type ProgramSet,
  programTests,
} from './kselftest/index.ts';
export { type LabRunOptions, runInLabMachine } from './lab_run.ts';

export { type MachineChoice, packageVersion, type RunRequest, runSelftests } from './run.ts';
export { suites } from './suites/index.ts';
