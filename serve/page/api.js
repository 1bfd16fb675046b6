// Calls of the server's public API. Addresses are relative, so that a proxy may add a prefix.

const KEY = "latentforge-key";

/** Error that the server answered with, or the lack of an answer (status 0). */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }

  /** True if the same request may succeed later. */
  get temporary() {
    return this.status === 0 || this.status === 429 || this.status >= 500;
  }
}

export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

async function send(path, { body, headers = {}, ...options } = {}) {
  const key = sessionStorage.getItem(KEY);
  const all = { ...headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  if (body !== undefined) {
    Object.assign(all, { "Content-Type": "application/json" });
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: all, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!answer.ok) throw await failure(answer);
  return answer;
}

async function failure(answer) {
  const error = (await answer.json().catch(() => ({}))).error ?? {};
  const retryAfter = Number(answer.headers.get("Retry-After")) || null;
  const message = error.message ?? `The server answered ${answer.status}.`;
  return new ApiError(message, { ...error, status: answer.status, retryAfter });
}

/** Return the JSON that the server answers; with a body, to POST. */
export const call = (path, options) => read(path, options, (answer) => answer.json());

/** Return the file at an address that the server gave, through whatever proxy the page came. */
export const file = (url) => read(url.slice(url.lastIndexOf("v1/jobs/")), {}, (answer) => answer.blob());

async function read(path, options, content) {
  const answer = await send(path, options);
  try {
    return await content(answer);
  } catch {
    throw new ApiError("The server's answer broke off.");
  }
}

/** Yield the events of a stream as {type, data}; EventSource could not send the key. */
export async function* events(path, signal) {
  const answer = await send(path, { headers: { Accept: "text/event-stream" }, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (text + value).replaceAll("\r\n", "\n").split("\n\n");
      text = blocks.pop();
      yield* blocks.map(parse).filter((event) => event !== null);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke off.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(block) {
  let type = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) type = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  return data.length ? { type, data: JSON.parse(data.join("\n")) } : null; // comments are pings
}
