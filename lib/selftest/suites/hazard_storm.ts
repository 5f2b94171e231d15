// SPDX-License-Identifier: Apache-2.0
// Everything at once: the L2s of two vCPUs use all the pages, and the host does all it can to them.
import { foldChecksum, type L2 } from '../../guest/index.ts';
import type { Observations, SelftestContext } from '../engine/model.ts';
import { bootL1, churn, hex } from './common.ts';
import { GuestPage, PAGE_GPA } from './guest_page.ts';
import type { HazardTest } from './hazard.ts';
import { APIC, DESCRIPTOR_GPA, ELSEWHERE, posted, text, UNRELATED, VAPIC_GPA } from './hazard_pages.ts';
import { NOTIFICATION, OPTIONS, VECTOR } from './posted.ts';
import { meanwhile } from './watchdog.ts';

const TURNS = 60;
const PERIOD_MS = 2;
/** Writes to it have no side effect but the exit. */
const LOGICAL_DESTINATION = 0xd0;
const POLICY = { 'apic-access': 'skip', 'external-interrupt': 'resume' } as const;

async function storm(context: SelftestContext): Promise<Observations> {
  await using machine = await bootL1(context, 2);
  const { vm, l1 } = machine;
  const pages = [PAGE_GPA, VAPIC_GPA, DESCRIPTOR_GPA, ELSEWHERE].map((gpa) => new GuestPage(vm, gpa));
  const trapping = await l1.createL2({ cpu: 0, apicAccess: PAGE_GPA, virtualApic: VAPIC_GPA }, (p) =>
    p.loop(TURNS, (body) =>
      body
        .fold(1)
        .write32(PAGE_GPA + LOGICAL_DESTINATION, 1)
        .writeCr8(5)
        .pause(100)
        .vmcall(),
    ),
  );
  const interrupted = await l1.createL2(
    {
      ...OPTIONS,
      cpu: 1,
      virtualApic: ELSEWHERE,
      postedInterrupts: { vector: NOTIFICATION, descriptor: DESCRIPTOR_GPA },
    },
    (p) => p.loop(TURNS, (body) => body.fold(2).writeCr8(5).pause(200).vmcall()),
  );
  let posts = 0;
  const changes = [
    () => vm.memory.add({ gpa: UNRELATED, size: 4096 }).delete(),
    (page: GuestPage) => page.pageout(),
    (page: GuestPage) => page.region.setFlags({ logDirtyPages: !page.region.logDirtyPages }),
    (page: GuestPage) => page.discard(),
    () => {
      posts += 1;
      interrupted.postedInterrupts?.post(VECTOR);
      l1.signal(NOTIFICATION, 1);
    },
  ];
  const host = churn(context, PERIOD_MS, (turn) =>
    changes[turn % changes.length]!(pages[Math.floor(context.random() * pages.length)]!),
  );
  const stops = new Set<string>();
  const run = async (l2: L2): Promise<void> => {
    while (!l2.progress.done) {
      const stop = await meanwhile(context, (signal) => l2.enter({ signal, policy: POLICY }));
      stops.add(text(stop));
      if (stop?.kind !== 'exit') break;
    }
  };
  const l2s = [trapping, interrupted];
  let made = 0;
  try {
    await Promise.all(l2s.map(run));
  } finally {
    made = await host.stop();
  }
  const taken = interrupted.interruptCount(VECTOR);
  return {
    stops: [...stops],
    checksums: l2s.map(({ progress }) => hex(progress.checksum)),
    executed: l2s.map(({ progress }) => progress.executed),
    trapped: trapping.exitCount('apic-access'),
    taken,
    unasked: Math.max(0, taken - posts),
    changes: made,
    posts,
  };
}

const repeated = (value: number) => hex(foldChecksum(Array.from({ length: TURNS }, () => value)));

const RIGHT = {
  stops: ['vmcall'],
  checksums: [repeated(1), repeated(2)],
  executed: [6 * TURNS, 5 * TURNS],
  taken: { min: 1, max: TURNS },
  unasked: 0,
  changes: { min: 10, max: 1000 },
};

export const STORM: HazardTest = {
  id: 'racing/pages',
  title:
    'discards, page-outs, other memslots, dirty logging and posted interrupts beneath the L2s of two vCPUs',
  requires: [APIC, ...posted],
  racing: true,
  expect: {
    // A page discarded beneath an active L2 does not trap there any more
    stock: { ...RIGHT, trapped: { min: 1, max: TURNS } },
    patched: { ...RIGHT, trapped: TURNS },
  },
  body: storm,
  evidence: ['posts'],
};
