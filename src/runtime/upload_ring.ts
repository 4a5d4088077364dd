/** Large uploads: staging memory that stays mapped by turns, filled by the host while the GPU copies out of the rest. */
import { allocateUnbound, type GpuBuffer } from "./buffers.ts";
import type { Gpu } from "./device.ts";

/** Staging buffers of a ring. */
export const UPLOAD_STAGES = 2;
/** Bytes of each. */
export const UPLOAD_STAGE_BYTES = 4 << 20;

interface Stage {
  readonly buffer: GpuBuffer;
  /** The memory to fill; undefined while the GPU has it. */
  mapped: Uint8Array | undefined;
  /** Resolves when the GPU has taken what was in it and it is mapped again. */
  ready: Promise<undefined> | undefined;
}

/**
 * Uploads of any size at the speed of memory. `queue.writeBuffer` allocates and clears staging memory for each call: on
 * an H100 it moved 1 GB/s where this moves 6 (docs/long_context.md).
 */
export class UploadRing {
  readonly #gpu: Gpu;
  readonly #stages: readonly Stage[];
  #turn = 0;
  #used = 0;
  #copies: { from: number; to: GpuBuffer; offset: number; bytes: number }[] = [];

  private constructor(gpu: Gpu, stages: readonly Stage[]) {
    this.#gpu = gpu;
    this.#stages = stages;
  }

  /** @throws OutOfMemoryError when the device has no memory for it */
  static async create(gpu: Gpu): Promise<UploadRing> {
    const usage = GPUBufferUsage.MAP_WRITE | GPUBufferUsage.COPY_SRC;
    const stages: Stage[] = [];
    try {
      for (let i = 0; i < UPLOAD_STAGES; i++) {
        const buffer = await allocateUnbound(gpu, "uploads", "staging", UPLOAD_STAGE_BYTES, usage);
        const ready = buffer.handle.mapAsync(GPUMapMode.WRITE);
        ready.catch(() => {}); // a ring may be destroyed before it is needed
        stages.push({ buffer, mapped: undefined, ready });
      }
      return new UploadRing(gpu, stages);
    } catch (error) {
      for (const { buffer } of stages) buffer.destroy();
      throw error;
    }
  }

  /** Copies host bytes into a buffer; offset and length are multiples of 4. The bytes may be reused when it resolves. */
  async write(buffer: GpuBuffer, bytes: Uint8Array, byteOffset = 0): Promise<void> {
    const end = this.#gpu.timeline?.begin("uploads", buffer.label);
    try {
      await this.#write(buffer, bytes, byteOffset);
    } finally {
      end?.(bytes.length);
    }
  }

  async #write(buffer: GpuBuffer, bytes: Uint8Array, byteOffset: number): Promise<void> {
    for (let done = 0; done < bytes.length;) {
      if (this.#used === UPLOAD_STAGE_BYTES) this.flush();
      const stage = this.#stages[this.#turn]!;
      if (stage.ready) {
        await this.#gpu.wait(stage.ready);
        stage.ready = undefined;
        stage.mapped = new Uint8Array(stage.buffer.handle.getMappedRange());
      }
      const part = bytes.subarray(done, done + UPLOAD_STAGE_BYTES - this.#used);
      stage.mapped!.set(part, this.#used);
      this.#copies.push({ from: this.#used, to: buffer, offset: byteOffset + done, bytes: part.length });
      this.#used += part.length;
      done += part.length;
    }
  }

  /** Hands over what was written: whatever is submitted afterwards sees it. */
  flush(): void {
    if (this.#copies.length === 0) return;
    const stage = this.#stages[this.#turn]!;
    const { handle } = stage.buffer;
    handle.unmap();
    stage.mapped = undefined;
    const encoder = this.#gpu.device.createCommandEncoder({ label: "uploads" });
    for (const { from, to, offset, bytes } of this.#copies) {
      encoder.copyBufferToBuffer(handle, from, to.handle, offset, bytes);
    }
    this.#gpu.device.queue.submit([encoder.finish()]);
    stage.ready = handle.mapAsync(GPUMapMode.WRITE);
    stage.ready.catch(() => {}); // a ring may be destroyed before it is needed again
    this.#turn = (this.#turn + 1) % UPLOAD_STAGES;
    this.#used = 0;
    this.#copies = [];
  }

  destroy(): void {
    for (const { buffer } of this.#stages) buffer.destroy();
  }
}
