// SPDX-License-Identifier: Apache-2.0

/** The emulated machine cannot be used at all: nothing was run in it. */
export class LabError extends Error {
  override readonly name = 'LabError';
  readonly what: string;
  readonly why: string;
  readonly advice: string;

  constructor(what: string, why: string, advice: string, options?: ErrorOptions) {
    super(`${what}: ${why}\n${advice}`, options);
    this.what = what;
    this.why = why;
    this.advice = advice;
  }
}

/** Gives a full disk, or a folder that cannot be written, its own plain words; other errors pass unchanged. */
export function explainDisk(error: unknown, folder: string): unknown {
  const code = (error as NodeJS.ErrnoException | undefined)?.code;
  const text = error instanceof Error ? error.message : String(error);
  if (code === 'ENOSPC' || code === 'EDQUOT' || /No space left on device|Disk quota exceeded/.test(text)) {
    return new LabError(
      'the disk is full',
      `there is no room left to write under ${folder}`,
      'free about 1 GB there, or set NVMX_CACHE to a folder on a larger disk',
      { cause: error },
    );
  }
  if (code === 'EACCES' || code === 'EROFS' || code === 'EPERM' || code === 'ENOTDIR') {
    return new LabError(
      'the cache folder cannot be used',
      text,
      'set NVMX_CACHE to a folder you can write to',
      { cause: error },
    );
  }
  return error;
}
