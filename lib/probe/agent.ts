// SPDX-License-Identifier: Apache-2.0
import { probeHost } from './host.ts';

// Runs inside the lab machine: the probe as one line of JSON.
process.stdout.write(`${JSON.stringify(probeHost())}\n`);
