// SPDX-License-Identifier: Apache-2.0
import type { ResolveHook } from 'node:module';

/** Inside the package its own name resolves to it, by the exports of its package.json. */
export const resolve: ResolveHook = (specifier, context, next) =>
  specifier === 'nvmx' || specifier.startsWith('nvmx/')
    ? next(specifier, { ...context, parentURL: import.meta.url })
    : next(specifier, context);
