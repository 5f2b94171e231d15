// SPDX-License-Identifier: Apache-2.0
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { open, stat } from 'node:fs/promises';

/** First byte, and the one after the last. */
export type DataRange = readonly [from: number, to: number];

const CHUNK = 1 << 16;
const READ = 1 << 22;
const SECTOR = 512;

export interface Contents {
  readonly sha256: string;
  /** Of a large file that is mostly holes: where it holds something other than zeros; the hash is of that. */
  readonly data?: readonly DataRange[];
}

/** Reads a file once. */
export async function contentsOfFile(path: string): Promise<Contents> {
  const { size, blocks } = await stat(path);
  const isSparse = size >= READ && blocks * SECTOR < size / 2;
  const hash = createHash('sha256');
  const zeros = Buffer.alloc(CHUNK);
  const data: [number, number][] = [];
  let at = 0;
  for await (const piece of createReadStream(path, { highWaterMark: READ })) {
    const bytes = piece as Buffer;
    for (let start = 0; start < bytes.length; start += CHUNK) {
      const chunk = bytes.subarray(start, start + CHUNK);
      if (isSparse && chunk.equals(zeros.subarray(0, chunk.length))) continue;
      hash.update(chunk);
      const last = data.at(-1);
      if (last?.[1] === at + start) last[1] += chunk.length;
      else data.push([at + start, at + start + chunk.length]);
    }
    at += bytes.length;
  }
  return { sha256: hash.digest('hex'), ...(isSparse && { data }) };
}

/** Of what a file has in these places. */
export async function sha256OfRanges(path: string, ranges: readonly DataRange[]): Promise<string> {
  const hash = createHash('sha256');
  const file = await open(path, 'r');
  try {
    const buffer = Buffer.alloc(READ);
    for (const [from, to] of ranges) {
      for (let at = from; at < to; ) {
        const { bytesRead } = await file.read(buffer, 0, Math.min(READ, to - at), at);
        if (bytesRead === 0) return '';
        hash.update(buffer.subarray(0, bytesRead));
        at += bytesRead;
      }
    }
    return hash.digest('hex');
  } finally {
    await file.close();
  }
}
