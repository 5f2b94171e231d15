// SPDX-License-Identifier: Apache-2.0
import type { Reporter, TestModule } from 'vitest/node';

/**
 * Prints what the built-in reporters leave out: a line with the reason for each skipped test, and a last line
 * `N passed, N failed, N skipped` that scripts can read.
 */
export default class LinesReporter implements Reporter {
  onTestRunEnd(modules: readonly TestModule[], errors: readonly unknown[]): void {
    const counts = { passed: 0, failed: 0, skipped: 0 };
    for (const module of modules) {
      for (const test of module.children.allTests()) {
        const result = test.result();
        if (result.state === 'skipped') {
          process.stdout.write(`# SKIP ${test.fullName}: ${result.note ?? 'no reason given'}\n`);
        }
        if (result.state !== 'pending') counts[result.state] += 1;
      }
      // A file that cannot even be loaded has no tests to fail.
      if (module.state() === 'failed' && [...module.children.allTests('failed')].length === 0)
        counts.failed += 1;
    }
    if (errors.length > 0) counts.failed += errors.length;
    process.stdout.write(`${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped\n`);
  }
}
