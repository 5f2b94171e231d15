// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { shard } from '../../lib/cli/options.ts';
import { probeHost } from '../../lib/probe/index.ts';
import {
  fixedSuite,
  type Observations,
  parseMatrix,
  parseSetting,
  type RunEvent,
  type RunOptions,
  runHere,
  type Selftest,
  type Suite,
  selftest,
  testsOf,
  variantName,
} from '../../lib/selftest/index.ts';

const options: RunOptions = { seed: 10, expect: 'auto', disposable: false };
const probe = probeHost();

function named(
  id: string,
  body: () => Observations | Promise<Observations>,
  more: Partial<Selftest> = {},
): Selftest {
  return selftest({
    id,
    title: id,
    requires: [],
    expectations: { any: { value: 1 } },
    body: async () => ({ observed: await body() }),
    ...more,
  });
}

describe('runHere', () => {
  test('verdicts: pass, fail with both values, error with its name, skip with its reason', async () => {
    const tests = [
      named('pass', () => ({ value: 1 })),
      named('fail', () => ({ value: 2 })),
      named('error', () => {
        throw new TypeError('broken');
      }),
      named('skip', () => ({ value: 1 }), { requires: [{ name: 'x', missing: () => 'needs x' }] }),
      named('hazard', () => ({ value: 1 }), { hazard: 'host-crash' }),
    ];
    const results = await runHere(tests, probe, options, () => {});
    expect(results.map(({ id, verdict, reason }) => [id, verdict, reason])).toEqual([
      ['pass', 'pass', undefined],
      ['fail', 'fail', 'value: expected 1, seen 2 (table "any")'],
      ['error', 'error', expect.stringMatching(/^TypeError: broken/)],
      ['skip', 'skip', 'needs x'],
      ['hazard', 'skip', expect.stringContaining('--disposable')],
    ]);
    expect(results.map((result) => result.reproduce)).toEqual([
      undefined,
      'nvmx test fail',
      'nvmx test error',
      undefined,
      undefined,
    ]);
  });

  test('a body that does not end is a timeout and is told to stop', async () => {
    let stopped = false;
    const endless = selftest({
      id: 'endless',
      title: '',
      requires: [],
      timeoutMs: 30,
      expectations: { any: {} },
      body: ({ signal }) =>
        new Promise((_, reject) => {
          signal.addEventListener('abort', () => {
            stopped = true;
            reject(signal.reason);
          });
        }),
    });
    const [result] = await runHere([endless], probe, options, () => {});
    expect([result?.verdict, result?.reason, stopped]).toEqual(['timeout', 'no result within 30 ms', true]);
  });

  test('rounds: each with its number and, where it races, its own seed', async () => {
    const seeds: number[] = [];
    const racing = selftest({
      id: 'racing',
      title: '',
      requires: [],
      racing: true,
      expectations: { any: {} },
      body: async ({ random }) => {
        seeds.push(random());
        return { observed: {} };
      },
    });
    const results = await runHere([racing], probe, { ...options, repeat: 3 }, () => {});
    expect(results.map(({ iteration, seed }) => [iteration, seed])).toEqual([
      [1, 10],
      [2, 11],
      [3, 12],
    ]);
    expect(new Set(seeds).size).toBe(3);
    const [again] = await runHere([racing], probe, { ...options, seed: 12 }, () => {});
    expect([again?.iteration, seeds[3]]).toEqual([undefined, seeds[2]]);
  });

  test('a run goes on from a cursor, and a duration that is over begins no round', async () => {
    const tests = ['a', 'b', 'c'].map((id) => named(id, () => ({ value: 1 })));
    const events: RunEvent[] = [];
    await runHere(tests, probe, { ...options, repeat: 2 }, (e) => events.push(e), { iteration: 1, index: 2 });
    const starts = events.flatMap((e) => (e.event === 'start' ? [`${e.id}${e.iteration}`] : []));
    expect(starts).toEqual(['c1', 'a2', 'b2', 'c2']);
    expect(await runHere(tests, probe, { ...options, durationMs: 0 }, () => {})).toEqual([]);
  });

  test('fail-fast stops at the first failure, not at a skip', async () => {
    const tests = [
      named('skip', () => ({ value: 1 }), { hazard: 'host-crash' }),
      named('fail', () => ({ value: 3 })),
      named('never', () => ({ value: 1 })),
    ];
    const results = await runHere(tests, probe, { ...options, failFast: true }, () => {});
    expect(results.map((result) => result.id)).toEqual(['skip', 'fail']);
  });

  test('the expected table can be chosen against the fingerprint', async () => {
    const both = named('both', () => ({ value: 1 }), {
      expectations: { change: 'pages', stock: { value: 1 }, patched: { value: 2 } },
    });
    const run = async (expect: RunOptions['expect']): Promise<unknown[]> => {
      const [result] = await runHere([both], probe, { ...options, expect }, () => {});
      return [result?.verdict, result?.expectation, result?.reason];
    };
    expect(await run('stock')).toEqual(['pass', 'stock', 'stock behaviour (unpatched)']);
    expect(await run('patched')).toEqual(['fail', 'patched', 'value: expected 2, seen 1 (table "patched")']);
  });

  test('a kernel with a part of the series is judged change by change', async () => {
    const changes = { ...probe.fingerprint.changes, pages: 'patched', evmcs: 'stock' } as const;
    const part = { ...probe, fingerprint: { ...probe.fingerprint, changes } };
    const tests = (['pages', 'evmcs'] as const).map((change) =>
      named(change, () => ({ value: 2 }), {
        expectations: { change, stock: { value: 1 }, patched: { value: 2 } },
      }),
    );
    const results = await runHere(tests, part, options, () => {});
    expect(results.map(({ verdict, expectation }) => [verdict, expectation])).toEqual([
      ['pass', 'patched'],
      ['fail', 'stock'],
    ]);
  });
});

describe('settings', () => {
  const suite: Suite = {
    name: 'turns',
    parameters: { c: { title: '', min: 1, max: 24, default: [2, 3] } },
    tests: ({ c = [] }) => c.map((value) => named(`turns/c=${value}`, () => ({ value: 1 }))),
  };
  const suites = [suite, fixedSuite('fixed', [named('fixed/a', () => ({ value: 1 }))])];
  const ids = (texts: string[]): string[] =>
    testsOf(suites, Object.assign({}, ...texts.map((text) => parseSetting(suites, text)))).map(
      ({ id }) => id,
    );

  test('defaults, numbers, ranges, and no value twice', () => {
    expect(ids([])).toEqual(['turns/c=2', 'turns/c=3', 'fixed/a']);
    expect(ids(['turns.c=7,1..3,2'])).toEqual([
      'turns/c=7',
      'turns/c=1',
      'turns/c=2',
      'turns/c=3',
      'fixed/a',
    ]);
  });

  test('a suite knows which values the user chose', () => {
    const told: string[][] = [];
    const curious: Suite = {
      name: 'curious',
      parameters: {
        c: { title: '', min: 1, max: 9, default: [1] },
        s: { title: '', min: 1, max: 9, default: [1] },
      },
      tests: (_, chosen) => {
        told.push([...chosen]);
        return [];
      },
    };
    testsOf([curious]);
    testsOf([curious], parseSetting([curious], 'curious.s=1'));
    expect(told).toEqual([[], ['s']]);
  });

  test.each([
    ['turns.c', 'is not SUITE.PARAMETER=VALUES'],
    ['moon.c=1', 'there is no suite "moon"'],
    ['turns.d=1', 'no parameter "d"; it has c'],
    ['fixed.c=1', 'it has none'],
    ['turns.constructor=1', 'no parameter "constructor"'],
    ['turns.c=0', '"0" is not a number or range within 1..24'],
    ['turns.c=3..25', '"3..25"'],
    ['turns.c=5..3', '"5..3"'],
    ['turns.c=1,x', '"x"'],
  ])('%s is refused: %s', (text, message) => {
    expect(() => parseSetting(suites, text)).toThrow(message);
  });
});

describe('matrix and shards', () => {
  test('every combination, the last fastest', () => {
    expect(parseMatrix(['kvm_intel.ept=0,1', 'kvm.ignore_msrs=Y,N']).map(variantName)).toEqual([
      'kvm_intel.ept=0 kvm.ignore_msrs=Y',
      'kvm_intel.ept=0 kvm.ignore_msrs=N',
      'kvm_intel.ept=1 kvm.ignore_msrs=Y',
      'kvm_intel.ept=1 kvm.ignore_msrs=N',
    ]);
  });

  test.each(['ept=0', 'kvm_amd.npt=0', 'kvm_intel.ept=', 'kvm_intel.ept=0,', 'kvm_intel.ept=0 1'])(
    '%s is refused',
    (text) => {
      expect(() => parseMatrix([text])).toThrow('is not MODULE.PARAMETER=VALUE');
    },
  );

  test('shards are disjoint, complete and about equal', () => {
    const all = Array.from({ length: 10 }, (_, i) => i);
    const parts = [1, 2, 3].map((i) => shard(all, `${i}/3`));
    expect(parts.map((part) => part.length)).toEqual([4, 3, 3]);
    expect(parts.flat().sort((a, b) => a - b)).toEqual(all);
    for (const bad of ['0/3', '4/3', '1/0', '1', 'a/b', '1/3/5']) {
      expect(() => shard(all, bad)).toThrow('it takes I/N');
    }
  });
});
