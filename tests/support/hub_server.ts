/**
 * A Hub on this machine: what `pull` asks of huggingface.co, with a second host for large files, as its CDN is one. Each
 * way in which a network or a server can fail is a switch.
 */
import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";

export interface HubRequest {
  readonly host: "hub" | "cdn";
  /** With the query. */
  readonly path: string;
  readonly range: string | undefined;
  readonly ifRange: string | undefined;
  readonly authorization: string | undefined;
  readonly userAgent: string | undefined;
}

/** What a server does with the body of a large file. */
export interface Delivery {
  /** Bytes after which the connection breaks off, once `received` says that they have come. */
  readonly cutAfter?: number;
  /** Bytes after which nothing comes any more. */
  readonly stallAfter?: number;
  /** The byte of the file that is sent inverted. */
  readonly corrupt?: number;
  /** Sends all of the file whatever part is asked for. */
  readonly ignoreRange?: boolean;
  /** Sends the part that begins so many bytes too early. */
  readonly shiftRange?: number;
  /** Sends so many bytes more than the file has, or fewer, and says so in Content-Length. */
  readonly lengthen?: number;
  /** Another entity tag than before. */
  readonly etag?: string;
}

/** An answer in place of the right one. */
export interface Refusal {
  readonly status: number;
  readonly headers?: Readonly<Record<string, string>>;
  readonly body?: string;
}

const COMMIT = "0123456789abcdef0123456789abcdef01234567";
const PAGE = 3;

export class HubServer {
  readonly requests: HubRequest[] = [];
  /** What happens to the next requests for bodies of large files, one after the other; as it should once they are used up. */
  deliveries: Delivery[] = [];
  /** Answers to the next requests that `refuses` chooses. */
  refusals: Refusal[] = [];
  /** Chooses by host and path; all of the Hub's unless set. */
  refuses: (request: HubRequest) => boolean = ({ host }) => host === "hub";
  /** The token without which nothing is given. */
  token: string | undefined;
  /** Files by name. */
  readonly files = new Map<string, Uint8Array>();
  /** Files that are stored apart, with SHA-256 in place of Git's SHA-1. */
  readonly large = new Set<string>();
  /** Changes to the listing, by name. */
  readonly listed = new Map<string, Readonly<Record<string, unknown>>>();
  commit = COMMIT;
  /** Answers that break off when so many bytes of their file have come. */
  readonly #cuts: { readonly at: number; readonly response: ServerResponse }[] = [];
  readonly #hub: Server;
  readonly #cdn: Server;

  private constructor() {
    this.#hub = createServer((request, response) => this.#answer("hub", request, response));
    this.#cdn = createServer((request, response) => this.#answer("cdn", request, response));
  }

  /** @param dir a model's folder; its .safetensors files are stored apart */
  static async open(dir: string): Promise<HubServer> {
    const server = new HubServer();
    server.serve(dir);
    for (const part of [server.#hub, server.#cdn]) {
      await new Promise<void>((resolve) => part.listen(0, "127.0.0.1", resolve));
    }
    return server;
  }

  /** Serves the files of another folder. */
  serve(dir: string): void {
    this.files.clear();
    this.large.clear();
    for (const name of readdirSync(dir)) {
      this.files.set(name, new Uint8Array(readFileSync(join(dir, name))));
      if (name.endsWith(".safetensors")) this.large.add(name);
    }
  }

  /** As it should be, and nothing asked yet. */
  reset(): void {
    this.requests.length = 0;
    this.deliveries = [];
    this.refusals = [];
    this.refuses = ({ host }) => host === "hub";
    this.token = undefined;
    this.listed.clear();
    this.#cuts.length = 0;
    this.commit = COMMIT;
  }

  get endpoint(): string {
    return `http://127.0.0.1:${(this.#hub.address() as AddressInfo).port}`;
  }

  get cdnEndpoint(): string {
    return `http://127.0.0.1:${(this.#cdn.address() as AddressInfo).port}`;
  }

  /** Requests for bodies of files, oldest first. */
  get transfers(): readonly HubRequest[] {
    return this.requests.filter(({ host, path }) => host === "cdn" || path.includes("/resolve/"));
  }

  async close(): Promise<void> {
    for (const part of [this.#hub, this.#cdn]) {
      part.closeAllConnections();
      await new Promise((resolve) => part.close(resolve));
    }
  }

  /** Tells how many bytes of a file the client has: what comes with the end of a connection can get lost. */
  received(bytes: number): void {
    for (const { at, response } of this.#cuts) if (at === bytes) response.destroy();
  }

  /** What Python's `huggingface_hub` names the file's blob. */
  blobName(name: string): string {
    const bytes = this.files.get(name)!;
    if (this.large.has(name)) return createHash("sha256").update(bytes).digest("hex");
    return createHash("sha1").update(`blob ${bytes.byteLength}\0`).update(bytes).digest("hex");
  }

  #answer(host: "hub" | "cdn", message: IncomingMessage, response: ServerResponse): void {
    const { url = "", headers } = message;
    const request: HubRequest = {
      host,
      path: url,
      range: headers.range,
      ifRange: headers["if-range"] as string | undefined,
      authorization: headers.authorization,
      userAgent: headers["user-agent"],
    };
    this.requests.push(request);
    const refusal = this.refuses(request) ? this.refusals.shift() : undefined;
    if (refusal) {
      response.writeHead(refusal.status, refusal.headers).end(refusal.body ?? "");
    } else if (host === "cdn") {
      this.#send(decodeURIComponent(url.split("/").at(-1)!), request, response);
    } else if (this.token !== undefined && request.authorization !== `Bearer ${this.token}`) {
      const wrong = { "x-error-message": "Invalid credentials in Authorization header" };
      response.writeHead(
        401,
        request.authorization === undefined ? { "x-error-code": "RepoNotFound" } : wrong,
      ).end();
    } else this.#hubAnswer(url, request, response);
  }

  #hubAnswer(url: string, request: HubRequest, response: ServerResponse): void {
    const [path = "", query] = url.split("?");
    const api = /^\/api\/models\/((?:[\w.-]+\/)?[\w.-]+)\/(revision|tree)\/([^/]+)$/.exec(path);
    const file = /^\/(?:[\w.-]+\/)?[\w.-]+\/resolve\/([^/]+)\/([^/]+)$/.exec(path);
    if (api?.[2] === "revision") {
      this.#sendJson(response, {
        _id: "1",
        id: api[1],
        sha: this.commit,
        lastModified: "2024-01-01T00:00:00.000Z",
      });
    } else if (api?.[2] === "tree" && api[3] === this.commit) {
      this.#sendPage(Number(new URLSearchParams(query).get("cursor") ?? 0), path, response);
    } else if (file && this.#isRevision(file[1]!) && this.files.has(decodeURIComponent(file[2]!))) {
      const name = decodeURIComponent(file[2]!);
      if (!this.large.has(name)) return this.#send(name, request, response);
      response.writeHead(302, {
        location: `${this.cdnEndpoint}/signed/${encodeURIComponent(name)}`,
        "x-repo-commit": this.commit,
        "x-linked-etag": `"${this.blobName(name)}"`,
        "x-linked-size": String(this.files.get(name)!.byteLength),
      }).end();
    } else response.writeHead(404, { "x-error-code": "EntryNotFound" }).end();
  }

  /** A commit has to be the one that there is. */
  #isRevision(name: string): boolean {
    return name === this.commit || !/^[0-9a-f]{40}$/.test(name);
  }

  #sendJson(response: ServerResponse, value: unknown, headers: Record<string, string> = {}): void {
    response.writeHead(200, { "content-type": "application/json", ...headers }).end(JSON.stringify(value));
  }

  /** A page of the listing, with the address of the next. */
  #sendPage(from: number, path: string, response: ServerResponse): void {
    const names = [...this.files.keys()].sort();
    const page = names.slice(from, from + PAGE).map((name) => {
      const { byteLength: size } = this.files.get(name)!;
      const oid = this.blobName(name);
      const lfs = { oid: "f".repeat(40), lfs: { oid, size, pointerSize: 134 }, xetHash: "e".repeat(64) };
      return {
        type: "file",
        path: name,
        size,
        ...this.large.has(name) ? lfs : { oid },
        ...this.listed.get(name),
      };
    });
    const next = `<${this.endpoint}${path}?cursor=${from + PAGE}>; rel="next"`;
    this.#sendJson(response, page, from + PAGE < names.length ? { link: next } : {});
  }

  #send(name: string, { range, ifRange }: HubRequest, response: ServerResponse): void {
    const large = this.large.has(name);
    const delivery = (large ? this.deliveries.shift() : undefined) ?? {};
    const whole = this.files.get(name)!.slice();
    if (delivery.corrupt !== undefined) whole[delivery.corrupt]! ^= 0xff;
    // A store has tags of its own.
    const etag = delivery.etag ?? (large ? '"store-1"' : `"${this.blobName(name)}"`);
    const [, first] = /^bytes=(\d+)-$/.exec(range ?? "") ?? [];
    const isPart = first !== undefined && !delivery.ignoreRange &&
      (ifRange === undefined || ifRange === etag);
    const begin = isPart ? Number(first) - (delivery.shiftRange ?? 0) : 0;
    if (isPart && begin >= whole.byteLength) {
      response.writeHead(416, { "content-range": `bytes */${whole.byteLength}` }).end();
      return;
    }
    const length = whole.byteLength - begin + (delivery.lengthen ?? 0);
    const body = new Uint8Array(length);
    body.set(whole.subarray(begin, begin + length));
    const headers = {
      "content-type": "application/octet-stream",
      "content-length": length,
      "x-repo-commit": this.commit,
      etag,
    };
    const rangeHeader = { "content-range": `bytes ${begin}-${whole.byteLength - 1}/${whole.byteLength}` };
    response.writeHead(isPart ? 206 : 200, { ...headers, ...isPart ? rangeHeader : {} });
    response.flushHeaders();
    const { cutAfter, stallAfter } = delivery;
    if (cutAfter === undefined && stallAfter === undefined) {
      response.end(body);
      return;
    }
    if (cutAfter !== undefined) this.#cuts.push({ at: begin + cutAfter, response });
    response.write(body.subarray(0, cutAfter ?? stallAfter), () => {
      // Nothing comes that the client could tell of.
      if (cutAfter === 0) response.destroy();
    });
  }
}
