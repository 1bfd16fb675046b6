// Jobs of this session: each of their images is an entry of the gallery.

import { ApiError, call, events, file } from "./api.js";
import { decoded } from "./picture.js";
import { drop, exchange, keep, randomName } from "./store.js";

const RETRIES = [500, 1000, 2000, 4000, 8000]; // milliseconds; the last one repeats
const POLL = 1000; // milliseconds
const ENDED = new Set(["completed", "failed", "cancelled", "lost"]);
const SENDING = "sending"; // of a request whose answer has not come; its key makes it unique
const LOST = "The server no longer has this image: it was restarted, or kept it too long ago";

const pause = (milliseconds, signal) => new Promise((resolve) => {
  setTimeout(resolve, milliseconds);
  signal?.addEventListener("abort", resolve, { once: true });
});

/**
 * Entries by key, newest first. Events: "change" with an entry in `detail`, null for several.
 *
 * An entry is {key, job, index, count, request, size, seed, status, created, blob, seconds, error},
 * and while it runs {position, step, steps, fraction, preview, left, away}.
 *
 * Only the job that is looked at has a stream of events; the others are asked for their state. A
 * browser opens six connections to a server, of all tabs together, and a stream occupies one.
 */
export class Jobs extends EventTarget {
  entries = new Map();
  #streamed = null; // job that is looked at
  #cancelled = new Set(); // jobs that were cancelled here
  #switch = new AbortController(); // ends the streams and pauses when another is looked at

  constructor() {
    super();
    document.addEventListener("visibilitychange", () => this.#switch.abort());
  }

  /** Take the entries of before a reload, watch those that had not ended, and finish sending. */
  async resume(all) {
    const kept = all.filter((entry) => entry.status !== SENDING);
    kept.sort((one, other) => other.created - one.created || one.index - other.index);
    for (const entry of kept) this.entries.set(entry.key, entry);
    const running = kept.filter((entry) => !ENDED.has(entry.status));
    for (const job of new Set(running.map((entry) => entry.job))) this.#watch(job);
    this.#changed(null);
    for (const entry of all.filter(({ status }) => status === SENDING)) await this.#send(entry);
  }

  of(job) {
    return [...this.entries.values()].filter((entry) => entry.job === job);
  }

  /** Send a request and return the entries of its images. */
  async submit(request) {
    const entry = { key: randomName(), status: SENDING, request, created: Date.now() };
    await keep(entry);
    return this.#send(entry);
  }

  /** Send a request, which has the same job as before if only the answer to it was lost. */
  async #send({ key, request, created }) {
    const answer = await resent("v1/jobs", request, key).catch(async (error) => {
      await drop(key);
      throw error;
    });
    const made = answer.seeds.map((seed, index) => ({
      key: `${answer.id}/${index}`, job: answer.id, index, count: answer.seeds.length,
      request, size: answer.size, seed,
      status: "queued", position: answer.queue_position, created,
    }));
    this.entries = new Map([...made.map((entry) => [entry.key, entry]), ...this.entries]);
    this.#changed(null);
    await exchange(key, made).then((kept) => kept || this.dispatchEvent(new Event("unkept")));
    this.look(answer.id);
    this.#watch(answer.id);
    return made;
  }

  /** Stream the events of this job from now on. */
  look(job) {
    if (job === this.#streamed) return;
    this.#streamed = job;
    this.#switch.abort();
  }

  async cancel(job) {
    this.#cancelled.add(job);
    await call(`v1/jobs/${job}/cancel`, { method: "POST" });
    await this.#ask(job);
  }

  /** Forget an entry; a job none of whose images is wanted any more is cancelled. */
  async remove(entry) {
    this.entries.delete(entry.key);
    this.#changed(null);
    await drop(entry.key);
    if (!ENDED.has(entry.status) && this.of(entry.job).length === 0) {
      await this.cancel(entry.job).catch(() => {}); // it has ended meanwhile, or the server has
    }
  }

  async #watch(job) {
    for (let failures = 0; this.#running(job);) {
      try {
        if (job === this.#streamed && !document.hidden) await this.#stream(job);
        if (this.#running(job)) await this.#ask(job);
        failures = 0;
      } catch (error) {
        this.#excuse(job, error);
        failures += 1;
      }
      const waiting = failures ? RETRIES[Math.min(failures, RETRIES.length) - 1] : POLL;
      if (this.#running(job)) await pause(waiting, this.#signal);
    }
  }

  get #signal() {
    if (this.#switch.signal.aborted) this.#switch = new AbortController();
    return this.#switch.signal;
  }

  async #stream(job) {
    try {
      for await (const { type, data } of events(`v1/jobs/${job}/events`, this.#signal)) {
        await APPLY[type]?.(this, job, data);
        if (ENDED.has(type)) return;
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    }
  }

  #running(job) {
    return this.of(job).some((entry) => !ENDED.has(entry.status));
  }

  /** Note why a job is out of reach: for good, or for now. */
  #excuse(job, error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 404 || error.status === 410) this.#end(job, "lost", LOST);
    else if (error.temporary) this.#set(job, { away: true });
    else this.#end(job, "failed", error.message);
  }

  /** Ask for the state of a job, and fetch the images that it has. */
  async #ask(job) {
    await this.state(job, await call(`v1/jobs/${job}`));
  }

  async state(job, { status, queue_position: position, progress, images, warnings, error, started, ended }) {
    this.warn(job, warnings);
    await Promise.all(images.map((image) => this.finish(job, image)));
    if (ENDED.has(status)) this.#end(job, status, error?.message, ended - started);
    else if (status === "queued") this.queue(job, position);
    else this.progress(job, { ...progress, images: this.of(job).map(({ index }) => index), previews: [] });
  }

  async finish(job, { index, url }) {
    const entry = this.entries.get(`${job}/${index}`);
    if (!entry || entry.blob) return;
    this.#update(entry, { blob: await file(url), status: "completed" });
  }

  /** Note which fields had no effect in part. */
  warn(job, warnings) {
    if (warnings?.length) this.#set(job, { warnings });
  }

  queue(job, position) {
    this.#set(job, { status: "queued", position });
  }

  begin(job) {
    this.#set(job, { status: "running", position: null });
  }

  progress(job, { step, steps, fraction, images, previews }) {
    const now = performance.now();
    for (const entry of this.of(job)) {
      if (ENDED.has(entry.status)) continue;
      const first = entry.first ?? { now, fraction };
      const pace = (now - first.now) / (fraction - first.fraction);
      const left = fraction > first.fraction ? (pace * (1 - fraction)) / 1000 : null;
      const picture = previews.find(({ index }) => index === entry.index);
      Object.assign(entry, { status: "running", away: false, fraction, first, left });
      if (images.includes(entry.index)) Object.assign(entry, { step, steps });
      if (picture) entry.preview = decoded(picture.b64_jpeg, "image/jpeg");
      this.#changed(entry);
    }
  }

  #end(job, status, message = null, seconds = null) {
    const error = status === "cancelled" && this.#cancelled.has(job) ? null : message;
    for (const entry of this.of(job)) {
      if (entry.status === "completed") this.#update(entry, { seconds });
      if (ENDED.has(entry.status)) continue;
      const missing = status === "completed" && !entry.blob;
      this.#update(entry, missing ? { status: "lost", error: LOST } : { status, error });
    }
  }

  #set(job, values) {
    for (const entry of this.of(job)) {
      if (!ENDED.has(entry.status)) this.#changed(Object.assign(entry, { away: false, ...values }));
    }
  }

  /** Change an entry and keep it, without what lasts as long as it runs. */
  #update(entry, values) {
    Object.assign(entry, values, { away: false, preview: null, first: null });
    this.#changed(entry);
    keep(entry).then((kept) => kept || this.dispatchEvent(new Event("unkept")));
  }

  #changed(entry) {
    this.dispatchEvent(new CustomEvent("change", { detail: entry }));
  }
}

const APPLY = {
  queued: (jobs, job, data) => jobs.queue(job, data.position),
  started: (jobs, job) => jobs.begin(job),
  progress: (jobs, job, data) => jobs.progress(job, data),
  warning: (jobs, job, data) => jobs.warn(job, data.warnings),
  image: (jobs, job, data) => jobs.finish(job, data),
  completed: (jobs, job, data) => jobs.state(job, data),
  failed: (jobs, job, data) => jobs.state(job, data),
  cancelled: (jobs, job, data) => jobs.state(job, data),
};

/** Send a request once more if its answer is lost: the key keeps it from being done twice. */
async function resent(path, body, name) {
  const options = { body, headers: { "Idempotency-Key": name } };
  try {
    return await call(path, options);
  } catch (error) {
    if (error.status !== 0) throw error;
    await pause(RETRIES[0]);
    return call(path, options);
  }
}
