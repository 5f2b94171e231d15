// SPDX-License-Identifier: Apache-2.0
import { probeDeeply } from './host.ts';

// Runs inside the lab machine: the probe as one line of JSON.
process.stdout.write(`${JSON.stringify(await probeDeeply())}\n`);
