/** A disk that is full behind some bytes of what is written through `FileHandle`s of this process. */
import { open } from "node:fs/promises";

/** Lets writes take `room` bytes together, the last of them only in part, while `work` runs. */
export async function withRoom<T>(room: number, work: () => Promise<T>): Promise<T> {
  const handle = await open("/dev/null");
  const prototype = Object.getPrototypeOf(handle);
  await handle.close();
  const { write } = prototype;
  let left = room;
  prototype.write = function (bytes: Uint8Array, offset: number, length: number, position: number) {
    if (left === 0) return Promise.reject(Object.assign(new Error("no space left"), { code: "ENOSPC" }));
    const taken = Math.min(left, length);
    left -= taken;
    return write.call(this, bytes, offset, taken, position);
  };
  try {
    return await work();
  } finally {
    prototype.write = write;
  }
}
