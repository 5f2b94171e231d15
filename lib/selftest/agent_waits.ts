// SPDX-License-Identifier: Apache-2.0
// The last of the modules that a machine has loaded when a snapshot is taken of it: the garbage of loading them
// would be collected in the first test of every run.
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { spareWork } from './agent_heap.ts';

spareWork();
setFlagsFromString('--expose-gc');
(runInNewContext('gc') as () => void)();
