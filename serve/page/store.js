// Images of this tab's session, kept over a reload in IndexedDB, and its form.

const SESSION = "latentforge-session";
const FORM = "latentforge-form";
const AGE = 24 * 3600 * 1000; // of what closed tabs left behind

const session = sessionStorage.getItem(SESSION) ?? randomName();
sessionStorage.setItem(SESSION, session);

let database = null; // null: the browser keeps nothing, as in some private windows

export function randomName() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

/** Open the store and return the session's entries; null if the browser keeps nothing. */
export async function open() {
  try {
    const request = indexedDB.open("latentforge", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("images", { keyPath: "key" });
    database = await done(request);
    const all = await done(images("readonly").getAll());
    const own = all.filter((entry) => entry.session === session);
    const old = all.filter((entry) => entry.session !== session && Date.now() - entry.created > AGE);
    await Promise.all(old.map((entry) => drop(entry.key)));
    return own;
  } catch {
    database = null;
    return null;
  }
}

const images = (mode) => database.transaction("images", mode).objectStore("images");

/** Keep an entry, or its latest state. Return false if the browser has no room. */
export async function keep(entry) {
  if (!database) return false;
  try {
    await done(images("readwrite").put({ ...entry, session }));
    return true;
  } catch {
    return false;
  }
}

/** Keep entries in the place of another, in one go: a reload finds that one or these. */
export async function exchange(key, entries) {
  if (!database) return false;
  const store = images("readwrite");
  store.delete(key);
  for (const entry of entries) store.put({ ...entry, session });
  return new Promise((resolve) => {
    store.transaction.oncomplete = () => resolve(true);
    store.transaction.onabort = () => drop(key).then(() => resolve(false));
  });
}

export async function drop(key) {
  if (database) await done(images("readwrite").delete(key)).catch(() => {});
}

export const keepForm = (values) => sessionStorage.setItem(FORM, JSON.stringify(values));

export function keptForm() {
  try {
    return JSON.parse(sessionStorage.getItem(FORM)) ?? {};
  } catch {
    return {};
  }
}
