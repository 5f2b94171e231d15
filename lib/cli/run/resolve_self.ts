// SPDX-License-Identifier: Apache-2.0
// Loaded before the user's script on the host: `nvmx` and `nvmx/…` mean the package that runs the script.
import { register } from 'node:module';

register('./resolve_hooks.js', import.meta.url);
