/**
 * HTTP with a Hugging Face Hub: which host, who gets the token, what is tried again, and what a refusal means. Redirects
 * are followed here and not by `fetch`, so that the token stays with the Hub wherever its files are stored.
 */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { HubError } from "../runtime/errors.ts";
import { formatModelId, hubHome, hubPath, hubSwitch, hubVariable, type ModelId } from "./hub.ts";

/** How long things may take, in milliseconds. */
export interface HubTiming {
  /** A server that sends nothing for so long has failed. */
  readonly stallMs: number;
  /** Before the second attempt; doubled for each one after it. */
  readonly retryMs: number;
  /** The longest wait that a server may ask for. */
  readonly mostWaitMs: number;
  /** A partial file that does not change for so long belongs to no process that runs. */
  readonly restMs: number;
}

export const DEFAULT_TIMING: HubTiming = { stallMs: 30_000, retryMs: 500, mostWaitMs: 60_000, restMs: 2_000 };

export interface HubOptions {
  /** What is sent as `User-Agent`. */
  readonly userAgent: string;
  readonly signal: AbortSignal;
  /** Called with a sentence, without a period, about what is not as usual. */
  readonly onNotice: (message: string) => void;
  readonly timing: HubTiming;
}

const PUBLIC_HUB = "https://huggingface.co";
/** Attempts at what fails on the way, without any progress between them. */
const MOST_ATTEMPTS = 5;
const MOST_REDIRECTS = 10;
/** No page of a list of files is longer, and no list has more pages. */
const MOST_API_BYTES = 4 << 20;
const MOST_QUESTIONS = 100;

/** A failure that another attempt may not have. */
export class TransientHubError extends HubError {
  /** What the server asks to wait; undefined where it does not say. */
  waitMs: number | undefined;
}

/** An answer whose body is yet to come. */
export interface HubAnswer {
  readonly response: Response;
  /** What the Hub itself says that the file's checksum is, wherever the answer comes from in the end. */
  readonly linkedEtag: string | undefined;
}

/**
 * The address of the Hub, without a slash at its end: `HF_ENDPOINT`, by default the public one.
 * @throws HubError when it is no web address
 */
export function hubEndpoint(): string {
  const text = hubVariable("HF_ENDPOINT") ?? PUBLIC_HUB;
  const url = URL.canParse(text) ? new URL(text) : undefined;
  if (url && isWeb(url) && url.username === "" && url.password === "") {
    return url.origin + url.pathname.replace(/\/+$/, "");
  }
  throw new HubError("HF_ENDPOINT is not the address of a Hub", {
    hint: `give an address such as ${PUBLIC_HUB}, and the token in HF_TOKEN`,
  });
}

/**
 * The user's token: `HF_TOKEN`, or what `hf auth login` has stored.
 * @throws HubError when what is there cannot be one; the message does not have it
 */
export async function hubToken(): Promise<string | undefined> {
  if (hubSwitch("HF_HUB_DISABLE_IMPLICIT_TOKEN")) return undefined;
  const token = (hubVariable("HF_TOKEN") ?? hubVariable("HUGGING_FACE_HUB_TOKEN") ?? await storedToken())
    ?.trim();
  if (!token) return undefined;
  if (/^[\x21-\x7e]+$/.test(token)) return token;
  throw new HubError("The token for the Hub has characters that no token has", {
    hint: "check HF_TOKEN, or run `hf auth login` again",
  });
}

async function storedToken(): Promise<string | undefined> {
  const path = hubVariable("HF_TOKEN_PATH");
  try {
    return await readFile(path === undefined ? join(hubHome(), "token") : hubPath(path), "utf8");
  } catch {
    return undefined; // there is none, or no home folder that it could be in
  }
}

function isWeb({ protocol }: URL): boolean {
  return protocol === "https:" || protocol === "http:";
}

/** Whether what is sent there stays on this machine. */
function isLocal({ hostname }: URL): boolean {
  return hostname === "localhost" || hostname === "[::1]" || /^127(\.\d+){3}$/.test(hostname);
}

/** Ends a request whose server has gone silent, or whose user does not want it any more. */
export class Watch {
  readonly signal: AbortSignal;
  readonly #silence = new AbortController();
  readonly #stallMs: number;

  constructor({ signal, timing }: HubOptions) {
    this.signal = AbortSignal.any([signal, this.#silence.signal]);
    this.#stallMs = timing.stallMs;
  }

  get isStalled(): boolean {
    return this.#silence.signal.aborted;
  }

  /** Waits for the server; what is done with its answer may take as long as it likes. */
  async over<T>(work: () => Promise<T>): Promise<T> {
    const timer = setTimeout(() => this.end(), this.#stallMs);
    try {
      return await work();
    } finally {
      clearTimeout(timer);
    }
  }

  /** Ends the request, wherever it is. */
  end(): void {
    this.#silence.abort();
  }
}

/** A Hub, as far as one repository is concerned. */
export class HubClient {
  readonly id: ModelId;
  /** The Hub's address, without a slash at its end. */
  readonly endpoint: string;
  readonly options: HubOptions;
  readonly #token: string | undefined;
  #questions = 0;

  private constructor(id: ModelId, endpoint: string, token: string | undefined, options: HubOptions) {
    this.id = id;
    this.endpoint = endpoint;
    this.options = options;
    this.#token = token;
  }

  /** @throws HubError when the environment names no Hub, or a token that is none */
  static async open(id: ModelId, options: HubOptions): Promise<HubClient> {
    const endpoint = hubEndpoint();
    const token = await hubToken();
    const url = new URL(endpoint);
    if (token === undefined || url.protocol === "https:" || isLocal(url)) {
      return new HubClient(id, endpoint, token, options);
    }
    options.onNotice(`${url.host} is asked without your token, which http would send for all to read`);
    return new HubClient(id, endpoint, undefined, options);
  }

  /** Where a file of a commit is. */
  fileUrl(commit: string, name: string): URL {
    return new URL(`${this.endpoint}/${this.id.repo}/resolve/${commit}/${encodeURIComponent(name)}`);
  }

  /** A `fetch` for questions with short answers: tried again where that helps, and whole when it returns. */
  readonly fetch = async (input: string | URL | Request): Promise<Response> => {
    if (++this.#questions > MOST_QUESTIONS) throw this.nonsense("a list without an end");
    return await this.retrying(() =>
      this.watched(async (watch) => {
        const { response } = await this.get(new URL(String(input)), { accept: "application/json" }, watch);
        const parts: Uint8Array<ArrayBuffer>[] = [];
        let bytes = 0;
        for await (const part of this.body(response, watch)) {
          bytes += part.byteLength;
          if (bytes > MOST_API_BYTES) throw this.nonsense("an answer that is too long");
          parts.push(part);
        }
        const link = response.headers.get("link");
        return new Response(new Blob(parts), { headers: link === null ? {} : { link } });
      })
    );
  };

  /** Runs what a silent server shall not hold up. */
  async watched<T>(work: (watch: Watch) => Promise<T>): Promise<T> {
    const watch = new Watch(this.options);
    try {
      return await work(watch);
    } finally {
      watch.end();
    }
  }

  /**
   * Tries until it works, or fails for good.
   * @param progress grows with what has been achieved: an attempt that got further does not count as failed
   */
  async retrying<T>(attempt: () => Promise<T>, progress: () => number = () => 0): Promise<T> {
    const { signal, timing, onNotice } = this.options;
    let failed = 0;
    for (;;) {
      signal.throwIfAborted();
      const before = progress();
      try {
        return await attempt();
      } catch (error) {
        if (!(error instanceof TransientHubError)) throw error;
        failed = progress() > before ? 1 : failed + 1;
        const waitMs = error.waitMs ?? timing.retryMs * 2 ** (failed - 1) * (0.5 + Math.random());
        if (failed === MOST_ATTEMPTS || waitMs > timing.mostWaitMs) throw error;
        onNotice(`${error.message}: trying again in ${(waitMs / 1000).toFixed(1)} s`);
        await delay(waitMs, undefined, { signal }).catch(() => signal.throwIfAborted());
      }
    }
  }

  /**
   * One request, redirects followed; the answer is a good one, or that there is no such range.
   * @throws TransientHubError, HubError for what is not to be had, or the reason of the user's signal
   */
  async get(url: URL, headers: Readonly<Record<string, string>>, watch: Watch): Promise<HubAnswer> {
    let linkedEtag: string | undefined;
    for (let hop = 0; hop <= MOST_REDIRECTS; hop++) {
      const response = await this.#getOnce(url, headers, watch);
      linkedEtag ??= plainEtag(response.headers.get("x-linked-etag"));
      if (response.ok || response.status === 416) return { response, linkedEtag };
      await response.body?.cancel().catch(() => {});
      if (response.status < 300 || response.status >= 400) throw this.#refusal(response, url);
      url = this.#redirected(response, url);
    }
    throw this.nonsense("redirects without an end");
  }

  /** The parts of an answer as they come. @throws as `get` */
  async *body(response: Response, watch: Watch): AsyncGenerator<Uint8Array<ArrayBuffer>> {
    const reader = response.body?.getReader();
    if (!reader) return;
    try {
      for (;;) {
        const { value, done } = await this.#onWire(new URL(response.url), watch, () => reader.read());
        if (done) return;
        yield value;
      }
    } finally {
      await reader.cancel().catch(() => {});
    }
  }

  /** An answer that no Hub gives. @param what as in "HOST sends …" */
  nonsense(what: string, cause?: unknown): HubError {
    return new HubError(`${new URL(this.endpoint).host} sends ${what}`, {
      hint: "check HF_ENDPOINT, and that no proxy answers in the Hub's place",
      cause,
    });
  }

  async #getOnce(url: URL, headers: Readonly<Record<string, string>>, watch: Watch): Promise<Response> {
    const isHub = url.origin === new URL(this.endpoint).origin;
    const authorization = isHub && this.#token !== undefined
      ? { authorization: `Bearer ${this.#token}` }
      : {};
    const request: RequestInit = {
      headers: {
        ...headers,
        ...authorization,
        "user-agent": this.options.userAgent,
        // Sizes, ranges and checksums are of the file itself.
        "accept-encoding": "identity",
      },
      redirect: "manual",
      signal: watch.signal,
    };
    return await this.#onWire(url, watch, () => fetch(url, request));
  }

  /** Whatever goes wrong on the way to a host and back. */
  async #onWire<T>({ host }: URL, watch: Watch, work: () => Promise<T>): Promise<T> {
    try {
      return await watch.over(work);
    } catch (cause) {
      this.options.signal.throwIfAborted();
      const hint = "check the network and the proxy; what has been downloaded is kept";
      if (!watch.isStalled) throw new TransientHubError(`The connection to ${host} failed`, { hint, cause });
      const seconds = this.options.timing.stallMs / 1000;
      throw new TransientHubError(`${host} has sent nothing for ${seconds} s`, { hint });
    }
  }

  /** Where a redirect leads. */
  #redirected(response: Response, from: URL): URL {
    const location = response.headers.get("location");
    const to = location !== null && URL.canParse(location, from.href) ? new URL(location, from) : undefined;
    if (to?.protocol === "https:" || (to?.protocol === "http:" && from.protocol === "http:")) return to;
    throw this.nonsense("a redirect to something that is not on the web, or not over https any more");
  }

  /** What an answer that is none means. */
  #refusal(response: Response, url: URL): HubError {
    const { status, headers } = response;
    const { host } = url;
    if (status === 429 || status === 408 || status >= 500) return transient(status, headers, host);
    if (url.origin !== new URL(this.endpoint).origin) {
      // An address that is signed for a while; the next attempt gets a new one.
      return new TransientHubError(`${host}, where the Hub stores the file, answers with status ${status}`, {
        hint: "try again; where it stays, ask who runs the Hub or the mirror",
      });
    }
    const { repo, revision } = this.id;
    const code = headers.get("x-error-code");
    const hasToken = this.#token !== undefined;
    if (code === "RevisionNotFound") {
      return new HubError(`${repo} has no revision ${revision} at ${host}`, {
        hint: `see its branches and tags at ${this.endpoint}/${repo}/tree/main`,
      });
    }
    if (code === "EntryNotFound") return this.nonsense("nothing for a file that it lists");
    if (code === "GatedRepo") {
      return new HubError(`${repo} is for those who have accepted its conditions`, {
        hint: hasToken
          ? `accept them at ${this.endpoint}/${repo} with the account that the token is of`
          : `accept them at ${this.endpoint}/${repo}, and set HF_TOKEN to a token of your account`,
      });
    }
    if (status === 401 && hasToken && code !== "RepoNotFound") {
      return new HubError(`${host} does not accept the token`, {
        hint: "correct HF_TOKEN or run `hf auth login`; a public repository needs none",
      });
    }
    if (status === 401 || status === 404) {
      // The Hub says 401 of what does not exist, so as not to tell what does.
      const id = formatModelId(this.id);
      if (hasToken) {
        return new HubError(`${host} has no repository ${id} that the token may read`, {
          hint: "check the name, and whose token it is",
        });
      }
      return new HubError(`${host} has no public repository ${id}`, {
        hint: "check the name; if it is private, set HF_TOKEN to a token that may read it",
      });
    }
    return new HubError(`${host} refuses ${repo} with status ${status}`, {
      hint: hasToken ? "check whether the token may read it" : "it may need a token in HF_TOKEN",
    });
  }
}

/** The server has no time, or is out of order. */
function transient(status: number, headers: Headers, host: string): TransientHubError {
  const waitMs = retryAfterMs(headers.get("retry-after"));
  const when = waitMs === undefined ? "later" : `in ${Math.ceil(waitMs / 1000)} s`;
  const error = status === 429
    ? new TransientHubError(`${host} has had too many requests from here`, {
      hint: `try again ${when}; with a token in HF_TOKEN more are allowed`,
    })
    : new TransientHubError(`${host} is out of order, it answers with status ${status}`, {
      hint: `try again ${when}; what has been downloaded is kept`,
    });
  error.waitMs = waitMs;
  return error;
}

/** A `Retry-After` header (RFC 9110, section 10.2.3), in milliseconds from now. */
function retryAfterMs(header: string | null): number | undefined {
  if (header === null) return undefined;
  const ms = /^\d+$/.test(header.trim()) ? 1000 * Number(header) : Date.parse(header) - Date.now();
  return Number.isNaN(ms) ? undefined : Math.max(0, ms);
}

/** An entity tag without quotes and without the mark of a weak one. */
function plainEtag(etag: string | null): string | undefined {
  return etag?.replace(/^W\//, "").replace(/^"|"$/g, "");
}
