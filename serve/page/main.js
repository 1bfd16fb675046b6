// Entry of the page: joins the form, the jobs, the selected image and the gallery.

import { call, hasKey } from "./api.js";
import { DepthMap } from "./depth.js";
import { announce, askClear, askKey, showCode, showLink } from "./dialogs.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { Jobs } from "./jobs.js";
import { Source } from "./source.js";
import { Stage } from "./stage.js";
import { open } from "./store.js";
import { duration, outcome, sentence } from "./text.js";

const $ = (id) => document.getElementById(id);

const PREVIEWS = 20; // of each image
const WAIT = 3000; // milliseconds between questions to a server that is away

const jobs = new Jobs();
const stage = new Stage();
const gallery = new Gallery(select);
let sharing = false;
const form = new Form(() => { showSource(); source.refit(); });
const source = new Source(() => form.size(), report);
const depth = new DepthMap(() => form.size(), report);
let current = null; // key of the selected entry

start();

async function start() {
  connectEvents();
  const kept = await open();
  if (kept === null) warnUnkept();
  const resumed = jobs.resume(kept ?? []).catch(reportError);
  select(jobs.entries.keys().next().value ?? null);
  await Promise.all([resumed, connect()]);
  if (current === null) select(jobs.entries.keys().next().value ?? null);
}

/** Ask the server what it can do, until it answers. */
async function connect() {
  for (;;) {
    try {
      showServer(await call("v1/capabilities"));
      return;
    } catch (error) {
      if (error.status === 401) {
        $("key-open").hidden = false;
        showState("away", "Needs an API key");
        if (!(await askKey(true))) return;
      } else {
        showState("away", "Server not reached");
        await new Promise((resolve) => setTimeout(resolve, WAIT));
      }
    }
  }
}

/** Say that the server is away, and look for it: it may come back with other models. */
async function reconnect() {
  if ($("server").dataset.state === "away") return;
  showState("away", "Server not reached");
  await connect();
}

function showServer(capabilities) {
  sharing = capabilities.limits.share_seconds !== null;
  form.offer(capabilities);
  const { length } = capabilities.models;
  showState("ready", length === 1 ? capabilities.models[0].id : `${length} models`);
}

function showState(name, text) {
  $("server").dataset.state = name;
  $("server").textContent = text;
}

function connectEvents() {
  $("key-open").hidden = !hasKey();
  $("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  $("form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  });
  jobs.addEventListener("change", ({ detail }) => showChange(detail));
  jobs.addEventListener("unkept", warnUnkept);
  document.addEventListener("announce", ({ detail }) => announce(detail));
  const actions = {
    cancel: () => jobs.cancel(selected().job),
    share, code: () => showCode(selected()),
    reuse: () => { form.take(selected()); $("prompt").focus(); },
    again: () => generate(selected().request, selected().seed),
    "start-from": startFrom, remove, clear, "key-open": changeKey,
  };
  for (const [id, action] of Object.entries(actions)) {
    $(id).addEventListener("click", async () => {
      report("", "stage-problem");
      try {
        await action();
      } catch (error) {
        await reportError(error, "stage-problem");
      }
    });
  }
}

const selected = () => jobs.entries.get(current);

async function submit() {
  if ($("generate").disabled) return; // no model yet, or a request is on its way
  form.reveal($("form").querySelector("input:invalid"));
  if (!$("form").reportValidity()) return;
  const request = form.request();
  if (source.missing) {
    report("This model needs an image.");
    form.blame("image");
    return;
  }
  if (depth.missing) {
    report("This model needs a depth map of the image.");
    form.blame("depth_map");
    return;
  }
  $("generate").disabled = true;
  try {
    const previews = form.model.previews ? { previews: PREVIEWS } : {};
    await generate({ ...request, ...(await source.fields()), ...(await depth.fields()), ...previews });
  } catch (error) {
    await reportError(error);
  } finally {
    $("generate").disabled = false;
  }
}

async function generate(request, seed = null) {
  report("");
  const whole = seed === null ? request : { ...request, n: 1, seed };
  const [first] = await jobs.submit(whole);
  select(first.key);
  announce("Queued.");
  if (matchMedia("(max-width: 56rem)").matches) $("stage").scrollIntoView({ block: "start" });
}

/** Show an error of the server where the user looks, and what to do about it. */
async function reportError(error, place = "problem") {
  if (error.status === undefined) throw error;
  if (error.status === 401) {
    $("key-open").hidden = false;
    report("The server needs an API key.", place);
    if (await askKey(true)) report("Try again with the new key.", place);
    return;
  }
  const again = error.retryAfter ? ` Try again in ${duration(error.retryAfter)}.` : "";
  report(sentence(form.labelled(error)) + again, place);
  if (error.param && place === "problem") form.blame(error.param);
}

function report(message, place = "problem") {
  $(place).textContent = message;
}

function warnUnkept() {
  $("banner").hidden = false;
  $("banner").textContent = "The browser keeps no images of this page: download those that you need before you leave.";
}

function select(key) {
  if (key !== current) report("", "stage-problem");
  current = key;
  if (selected()) jobs.look(selected().job);
  gallery.mark(key);
  showStage();
}

function showStage() {
  stage.show(selected() ?? null, form.model);
  $("share").hidden ||= !sharing;
}

function showSource() {
  const model = form.model;
  if (!model) return;
  source.allow(model.tasks);
  depth.allow(model);
}

function showChange(entry) {
  if (entry === null) gallery.showAll(jobs.entries, current);
  else gallery.update(entry);
  if (entry?.away) reconnect();
  if (entry !== null && entry.key !== current) return;
  if (entry !== null) speak(entry);
  const running = selected()?.status === "running" && selected().fraction;
  document.title = running ? `${Math.floor(100 * running)} % · latentforge` : "latentforge";
  showStage();
}

/** Speak the state of the selected entry: each change of it, and each quarter of the steps. */
function speak(entry) {
  const quarter = entry.steps ? Math.floor((4 * entry.step) / entry.steps) : 0;
  const mark = [entry.key, entry.status, quarter, entry.away].join();
  if (mark === speak.last) return;
  speak.last = mark;
  announce(entry.status === "completed" ? "The image is ready." : outcome(entry));
}

async function share() {
  const { job, index } = selected();
  try {
    const link = await call("v1/shares", { body: { job, index } });
    // The server's own address is another if it was given one for links; else this one is right.
    const elsewhere = new URL(link.url).host !== location.host;
    const url = elsewhere ? link.url : new URL(`s/${link.id}`, document.baseURI).href;
    await showLink(url, link.expires);
  } catch (error) {
    if (error.status !== 404 && error.status !== 410) throw error;
    report("The server no longer has this image, so it cannot be shared: generate it again, or download it.", "stage-problem");
    $("again").hidden = false;
  }
}

async function startFrom() {
  await source.take(selected().blob);
  $("source").scrollIntoView({ block: "nearest" });
  $("mask-open").focus();
}

async function remove() {
  const keys = [...jobs.entries.keys()];
  const place = keys.indexOf(current);
  await jobs.remove(selected());
  const next = keys[place + 1] ?? keys[place - 1] ?? null;
  select(next);
  if (next) gallery.focus(next);
  else $("prompt").focus();
}

async function clear() {
  if (!(await askClear())) return;
  for (const entry of [...jobs.entries.values()]) await jobs.remove(entry);
  select(null);
  $("prompt").focus();
}

async function changeKey() {
  if (await askKey(false)) await connect();
}
