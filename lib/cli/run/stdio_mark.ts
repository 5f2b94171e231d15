// SPDX-License-Identifier: Apache-2.0
/** Begins a line of the script's stderr on the lab machine's one line to the host; no text has these control codes. */
export const STDERR_MARK = '\u0001e\u0002';
