// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { requiredDebianPackages } from '../../lib/lab/index.ts';
// @ts-expect-error: the set-up scripts are plain JavaScript, they run before anything is installed
import { missingPackages, PACKAGES } from '../../scripts/packages.mjs';

test('npm start installs what the lab needs to build its emulator', () => {
  expect(PACKAGES).toEqual(expect.arrayContaining([...requiredDebianPackages]));
});

test('a package that is not installed is missing, one that is is not', () => {
  expect(missingPackages(['dpkg', 'nvmx-no-such-package'])).toEqual(['nvmx-no-such-package']);
});
