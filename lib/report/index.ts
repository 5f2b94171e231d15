// SPDX-License-Identifier: Apache-2.0
export { formatValue, renderBench } from './bench.ts';
export {
  type BenchComparison,
  CompareError,
  type Comparison,
  compareReports,
  type FigureComparison,
  parseResult,
  slowerThan,
  type TestComparison,
} from './compare.ts';
export { renderCompareHtml } from './compare_html.ts';
export { renderCompareMarkdown, renderCompareTable, renderCompareText } from './compare_text.ts';
export { githubReporter } from './github.ts';
export { jsonReporter, parseReport } from './json.ts';
export { junitReporter } from './junit.ts';
export { ktapReporter } from './ktap.ts';
export { MergeError, mergeReports } from './merge.ts';
export { renderProbe } from './probe.ts';
export { type Reporter, resultName, type Write } from './reporter.ts';
export { specReporter } from './spec.ts';
