// SPDX-License-Identifier: Apache-2.0
import type { ParameterValues, Selftest, Suite } from './model.ts';

/** Chosen values, `suite.parameter` → values. */
export type Settings = Readonly<Record<string, readonly number[]>>;

/** A setting names a suite, a parameter or a value that does not exist. */
export class SettingError extends Error {
  override readonly name = 'SettingError';
}

/** A suite whose tests are always the same. */
export function fixedSuite(name: string, tests: readonly Selftest[]): Suite {
  return { name, parameters: {}, tests: () => tests };
}

/** Suites by their names; one that is only a list of tests has no parameters. */
export function suitesOf(parts: Readonly<Record<string, Suite | readonly Selftest[]>>): Suite[] {
  return Object.entries(parts).map(([name, part]) => ('tests' in part ? part : fixedSuite(name, part)));
}

/**
 * Reads `suite.parameter=values`; values are numbers and ranges, such as `2,4,8..16`.
 *
 * @throws SettingError with what is possible instead
 */
export function parseSetting(suites: readonly Suite[], text: string): Settings {
  const match = /^([\w-]+)\.([\w-]+)=(.+)$/.exec(text);
  if (!match) throw new SettingError(`"${text}" is not SUITE.PARAMETER=VALUES, such as l2-switch.c=1..24`);
  const [, suiteName = '', name = '', values = ''] = match;
  const suite = suites.find((one) => one.name === suiteName);
  if (!suite) throw new SettingError(`there is no suite "${suiteName}"`);
  const parameter = Object.hasOwn(suite.parameters, name) ? suite.parameters[name] : undefined;
  if (!parameter) {
    const names = Object.keys(suite.parameters).join(', ') || 'none';
    throw new SettingError(`the suite ${suiteName} has no parameter "${name}"; it has ${names}`);
  }
  const { min, max } = parameter;
  const numbers = values.split(',').flatMap((part) => {
    const range = /^(\d+)(?:\.\.(\d+))?$/.exec(part);
    const first = Number(range?.[1] ?? Number.NaN);
    const last = range?.[2] === undefined ? first : Number(range[2]);
    if (!(first >= min && last <= max && first <= last)) {
      throw new SettingError(
        `${suiteName}.${name}: "${part}" is not a number or range within ${min}..${max}`,
      );
    }
    return Array.from({ length: last - first + 1 }, (_, i) => first + i);
  });
  return { [`${suiteName}.${name}`]: [...new Set(numbers)] };
}

/** Every test of the suites, with the settings where there are any and the defaults elsewhere. */
export function testsOf(suites: readonly Suite[], settings: Settings = {}): Selftest[] {
  return suites.flatMap((suite) => {
    const values: ParameterValues = Object.fromEntries(
      Object.entries(suite.parameters).map(([name, parameter]) => [
        name,
        settings[`${suite.name}.${name}`] ?? parameter.default,
      ]),
    );
    const chosen = Object.keys(values).filter((name) => settings[`${suite.name}.${name}`] !== undefined);
    return suite.tests(values, new Set(chosen));
  });
}
