/** What a machine's files and environment say. Nothing throws: a missing file is a fact like any other. */
import {
  accessSync,
  closeSync,
  constants,
  existsSync,
  openSync,
  readdirSync,
  readSync,
  realpathSync,
  statSync,
} from "node:fs";
import { join } from "node:path";
import process from "node:process";

export interface HostOptions {
  /** Stands in front of every path; tests make up a machine below it. */
  readonly root?: string;
  /** In place of the process's environment. */
  readonly env?: Readonly<Record<string, string | undefined>>;
}

/** A machine as this process sees it. Paths are absolute, and have `/` between their parts. */
export class Host {
  readonly #root: string;
  readonly #env: Readonly<Record<string, string | undefined>>;
  readonly #hidden = new Set<string>();

  constructor({ root = "/", env = process.env }: HostOptions = {}) {
    this.#root = root;
    this.#env = env;
  }

  /** What this process may not see: folders, and variables of the environment. */
  get hidden(): readonly string[] {
    return [...this.#hidden].sort();
  }

  /** Deno shows /proc, /dev and /sys only to programs that may do anything, and variables by permission. */
  #try<T>(what: string, look: () => T): T | undefined {
    try {
      return look();
    } catch (error) {
      if ((error as Error).name === "NotCapable") this.#hidden.add(what);
      return undefined;
    }
  }

  #look<T>(path: string, look: (path: string) => T): T | undefined {
    return this.#try(path.split("/", 2).join("/"), () => look(join(this.#root, path)));
  }

  variable(name: string): string | undefined {
    return this.#try(name, () => this.#env[name]);
  }

  exists(path: string): boolean {
    return this.#look(path, existsSync) ?? false;
  }

  isFolder(path: string): boolean {
    return this.#look(path, (real) => statSync(real).isDirectory()) ?? false;
  }

  fileBytes(path: string): number {
    return this.#look(path, (real) => statSync(real).size) ?? 0;
  }

  /** Whether this user may read and write a file. */
  mayOpen(path: string): boolean {
    return this.#look(path, (real) => {
      accessSync(real, constants.R_OK | constants.W_OK);
      return true;
    }) ?? false;
  }

  /** The names in a folder, sorted; none where there is no such folder. */
  names(folder: string): readonly string[] {
    return this.#look(folder, (real) => readdirSync(real).sort()) ?? [];
  }

  /** The last part of the path behind all symbolic links. */
  realName(path: string): string | undefined {
    return this.#look(path, (real) => realpathSync(real))?.split("/").at(-1);
  }

  /** Up to `length` bytes from `offset` on; undefined where the file cannot be read. */
  bytes(path: string, offset: number, length: number): Uint8Array | undefined {
    return this.#look(path, (real) => {
      const file = openSync(real, "r");
      try {
        const bytes = new Uint8Array(length);
        return bytes.subarray(0, readSync(file, bytes, 0, length, offset));
      } finally {
        closeSync(file);
      }
    });
  }

  /** A small text file; undefined where it cannot be read. */
  text(path: string): string | undefined {
    const bytes = this.bytes(path, 0, MOST_TEXT_BYTES);
    return bytes && new TextDecoder().decode(bytes);
  }
}

/** What is read as text (manifests, /proc, os-release) has a few hundred bytes. */
const MOST_TEXT_BYTES = 1 << 16;
