// SPDX-License-Identifier: Apache-2.0
export { discover, KselftestError, type Program, type ProgramSet } from './discover.ts';
export { namesOf } from './names.ts';
export { programTests } from './program_test.ts';
