// Dialogs: the API key, links, code, and a question before images are lost.

import { hasKey, setKey } from "./api.js";
import { decoded, holes } from "./picture.js";
import { curl, pythonProgram } from "./snippets.js";

const $ = (id) => document.getElementById(id);

/** Show a dialog and resolve to the value of the button that closed it. */
async function answered(dialog) {
  dialog.returnValue = "cancel";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue;
}

/** Ask for the API key, and resolve to true if one was given. */
export async function askKey(refused) {
  if ($("key-dialog").open) return false;
  if (refused && hasKey()) $("key-note").textContent = "The server refused this key. It stays in this tab and is forgotten when you close it.";
  $("key").value = "";
  if ((await answered($("key-dialog"))) !== "ok" || !$("key").value.trim()) return false;
  setKey($("key").value.trim());
  $("key").value = "";
  return true;
}

export const askClear = async () => (await answered($("clear-dialog"))) === "ok";

export async function showLink(url, expires) {
  $("share-link").value = url;
  const until = new Date(expires * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
  $("share-note").textContent = `Anyone with the link sees the image, its prompt and its settings until ${until}.`;
  $("share-send").hidden = !navigator.share;
  $("share-send").onclick = () => navigator.share({ url }).catch(() => {}); // the user changed their mind
  $("share-copy").onclick = () => copy($("share-copy"), url, $("share-link"));
  await answered($("share-dialog"));
}

export async function showCode(entry) {
  const { image, mask } = entry.request;
  const files = { ...(image ? { "image.png": decoded(image, "image/png") } : {}), ...(mask ? { "mask.png": await holes(decoded(mask, "image/png")) } : {}) };
  const links = Object.entries(files).map(([name, blob]) => link(name, blob));
  $("code-files").replaceChildren(...links);
  $("code-note").textContent = [
    links.length ? `They read ${Object.keys(files).join(" and ")} from the folder that they run in.` : "",
    hasKey() ? "They read the key from the variable LATENTFORGE_API_KEY." : "",
  ].join(" ").trim();
  const base = document.baseURI;
  $("curl").textContent = curl(entry, base, hasKey());
  $("python").textContent = pythonProgram(entry, base, hasKey());
  $("copy-curl").onclick = () => copy($("copy-curl"), $("curl").textContent, $("curl"));
  $("copy-python").onclick = () => copy($("copy-python"), $("python").textContent, $("python"));
  await answered($("code-dialog"));
  for (const { href } of links) URL.revokeObjectURL(href);
}

function link(name, blob) {
  const made = document.createElement("a");
  Object.assign(made, { className: "button", textContent: `Download ${name}`, href: URL.createObjectURL(blob), download: name });
  return made;
}

/** Copy a text; where the browser allows that on HTTPS alone, select it for the user to copy. */
async function copy(button, text, element) {
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied.");
    flash(button);
  } catch {
    if (element.select) element.select();
    else getSelection().selectAllChildren(element);
    announce(document.execCommand("copy") ? "Copied." : "Selected: copy it with the keyboard.");
  }
}

function flash(button) {
  const label = button.firstChild;
  const text = label.data;
  if (text === "Copied") return;
  label.data = "Copied";
  setTimeout(() => { label.data = text; }, 1500);
}

/** Let a screen reader speak a message. */
export function announce(message) {
  $("status").textContent = message;
}

for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close("cancel"));
}
