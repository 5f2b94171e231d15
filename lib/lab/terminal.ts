// SPDX-License-Identifier: Apache-2.0
import { once } from 'node:events';
import { type AddressInfo, createServer, type Server, type Socket } from 'node:net';
import type { Readable, Writable } from 'node:stream';

/** A serial line that the emulator connects to somebody's terminal. */
export class TerminalLine {
  readonly #server: Server;
  readonly #input: Readable;
  #socket: Socket | undefined;

  private constructor(server: Server, { input, output }: { input: Readable; output: Writable }) {
    this.#server = server;
    this.#input = input;
    server.once('connection', (socket) => {
      // One line has one machine at its end.
      server.close();
      this.#socket = socket;
      socket.on('error', () => undefined);
      socket.pipe(output, { end: false });
      // Nobody listens before the first prompt, and a serial line keeps nothing.
      socket.once('data', () => input.pipe(socket, { end: false }));
    });
  }

  /** Waits on this machine only, for one connection. */
  static async open(ends: { input: Readable; output: Writable }): Promise<TerminalLine> {
    const server = createServer();
    const line = new TerminalLine(server, ends);
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');
    return line;
  }

  get port(): number {
    return (this.#server.address() as AddressInfo).port;
  }

  close(): void {
    if (this.#socket) this.#input.unpipe(this.#socket);
    this.#input.pause();
    this.#socket?.destroy();
    this.#server.close();
  }
}
