// Texts of numbers and states, in plain words.

/** Return a duration: "0.42 s", "3.1 s", "2 min", "5 h", "7 days". */
export function duration(seconds) {
  if (seconds < 10) return `${Number(seconds.toFixed(seconds < 1 ? 2 : 1))} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  return minutes < 48 * 60 ? `${Math.round(minutes / 60)} h` : `${Math.round(minutes / 60 / 24)} days`;
}

export function timeLeft(seconds) {
  return seconds < 1 ? "a moment left" : `about ${duration(Math.ceil(seconds))} left`;
}

/** Return a message as a sentence. */
export function sentence(message) {
  return message.charAt(0).toUpperCase() + message.slice(1) + (/[.!?]$/.test(message) ? "" : ".");
}

/** Return the state of an entry, and why, in sentences. */
export function outcome(entry) {
  return [state(entry), entry.error].filter(Boolean).map(sentence).join(" ");
}

/** Return the state of an entry in a few words. */
export function state(entry) {
  if (entry.away) return "Waiting for the server";
  if (entry.status === "queued") return entry.position ? `Queued, ${entry.position} ahead` : "Queued";
  if (entry.status === "running") return entry.steps ? `Step ${entry.step} of ${entry.steps}` : "Starting";
  return { failed: "Failed", cancelled: "Cancelled", lost: "Lost" }[entry.status] ?? "";
}

/** Return a file name of a prompt and seed. */
export function fileName(entry) {
  const words = entry.request.prompt.normalize("NFKD").toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  const name = words.join("-").slice(0, 60).replace(/-$/, "") || "image";
  return `${name}-${entry.seed}.png`;
}
