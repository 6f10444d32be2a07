// The page: one region after another, from the lease to the stored answer.

import * as api from "./api.js";
import {Keys} from "./keys.js";
import {Local} from "./local.js";
import {WINDOWS, colour} from "./look.js";

const $ = id => document.getElementById(id);
const h = (tag, attributes, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  // Everything that came from outside enters as text of a node, never as markup.
  node.append(...children.flat().filter(child => child !== null && child !== undefined));
  return node;
};
const DRAFT_SECONDS = 5, RENEW_SECONDS = 60;

const page = {client: "", region: null, prefetched: null, start: "nothing", dirty: false, unsent: false, done: 0, active: 0,
  renewed: 0, busy: false, storing: new Set(), past: new Set()};
const local = new Local();
let viewer = null;

function drawn() {
  page.dirty = page.unsent = true;
  page.active = Date.now();
  local.keep(page.region.query, viewer.label.voxels, page.start);
  $("undo").disabled = !viewer.label.past.length;
  $("redo").disabled = !viewer.label.future.length;
  tell("not yet submitted");
}

const tell = text => { $("state").textContent = text; };

// A sentence over the stage, with buttons: [text, action].
function say(sentence, buttons = [], bad = false) {
  const box = $("message");
  box.hidden = !sentence;
  box.className = bad ? "bad" : "";
  box.querySelector("p").textContent = sentence;
  box.querySelector(".row").replaceChildren(...buttons.map(([text, act]) => {
    const button = h("button", {}, text);
    button.addEventListener("click", () => { box.hidden = true; act(); });
    return button;
  }));
}

async function attempt(work, retry) {
  if (page.busy) return;
  page.busy = true;
  enable();
  let signedOut = false;
  try { await work(); }
  catch (error) {
    signedOut = error.status === 401;
    if (!signedOut) say(error.message, [["Try again", retry || (() => attempt(work))]], true);
  } finally { page.busy = false; enable(); }
  if (signedOut) await askName(true);
}

function enable() {
  const open = page.region !== null && !page.busy;
  for (const id of ["submit", "skip", "release", "clear", "copy", "between", "from-nothing"]) $(id).disabled = !open;
  $("from-prediction").disabled = !open || !page.region.has_prediction;
  $("undo").disabled = !open || !viewer?.label?.past.length;
  $("redo").disabled = !open || !viewer?.label?.future.length;
}

// --- regions -------------------------------------------------------------------------------------------------------

async function fetched() {
  const strategy = $("strategy").value;
  // The list may be older than an answer that was given since.
  const held = (await api.held(page.client)).filter(query => !page.past.has(query));
  let query = held[0];
  if (query === undefined) {
    const found = await api.next(page.client, strategy);
    query = found.regions?.[0]?.query;
    if (query === undefined) return null;
  }
  const [region, image, kept] = await Promise.all([api.region(query, page.client), api.image(query), api.draft(query, page.client)]);
  return {region, image, kept};
}

async function advance() {
  if (!page.storing.size) say("");
  page.region = null;
  delete document.body.dataset.query;
  tell("next region ...");
  const got = (await page.prefetched?.catch(() => null)) || await fetched();
  page.prefetched = null;
  if (!got) {
    viewer.close();
    $("where").textContent = "nothing left";
    tell("");
    return say("Every region has been asked for, or is in work elsewhere.", [["Look again", () => attempt(advance)]]);
  }
  await open(got);
  page.prefetched = fetched();
  page.prefetched.catch(() => null);
}

async function open({region, image, kept: draft}) {
  await viewer.open(image, region.view, region.classes);
  page.region = region;
  page.past.add(region.query);
  document.body.dataset.query = region.query;
  page.start = "nothing";
  page.dirty = page.unsent = false;
  page.active = page.renewed = Date.now();
  const kept = draft || local.get(region.query);
  if (kept && kept.voxels.length === viewer.label.voxels.length && kept.voxels.some(Boolean)) {
    page.start = kept.start;
    viewer.edit(label => label.put(kept.voxels));
    page.dirty = true;
    tell("your draft was taken up again");
  } else tell(`${region.view.size.join(" × ")} voxels`);
  $("where").textContent = `region ${page.done + 1} · ${region.image}`;
  why(region);
  setClasses(region.classes);
  viewer.window = WINDOWS[$("window").value];
  enable();
  $("canvas").focus();
}

function why(region) {
  const reason = region.reason, predicted = Object.entries(reason.predicted || {}).filter(([, share]) => share >= 0.005);
  const lines = [`asked by ${reason.method || region.method}` + (reason.rank ? `, rank ${reason.rank}` : "")];
  if (reason.uncertainty) lines.push(`${reason.uncertainty.replaceAll("_", " ")} ${Number(reason.score).toPrecision(3)}`);
  if (predicted.length) lines.push("predicted: " + predicted.map(([name, share]) => `${name} ${Math.round(100 * share)} %`).join(", "));
  $("why").replaceChildren(...lines.map(line => h("p", {}, line)));
}

async function submit() {
  if (!page.region || page.busy) return;
  viewer.settle();
  if (viewer.label.isEmpty && await asked("empty") !== "yes") return;
  const {query, image} = page.region;
  store({query, image, voxels: viewer.label.voxels, start: page.start});
  page.dirty = page.unsent = false;
  attempt(advance);
}

// Stored while the next region is open: the label of a large scan takes the server a while. The drawing is kept here until
// the server has answered.
async function store(answer) {
  page.storing.add(answer.query);
  document.body.dataset.storing = page.storing.size;
  local.keep(answer.query, answer.voxels, answer.start);
  try {
    await api.answer(answer.query, page.client, answer.voxels, answer.start);
    local.drop(answer.query);
    page.done++;
    page.storing.delete(answer.query);
    if (!page.storing.size) delete document.body.dataset.storing;
    if (page.region) $("where").textContent = `region ${page.done + 1} · ${page.region.image}`;
  } catch (error) {
    say(`The region of ${answer.image} was not stored. ${error.message}`, [["Store again", () => store(answer)]], true);
  }
}

async function skip() {
  if (!page.region || page.busy || await asked("reason") !== "yes") return;
  const reason = $("reason").querySelector("input").value;
  attempt(async () => { await api.skip(page.region.query, page.client, reason); local.drop(page.region.query); page.dirty = false; await advance(); }, skip);
}

function release() {
  if (!page.region) return;
  attempt(async () => {
    await api.release(page.region.query, page.client);
    page.past.delete(page.region.query);
    page.dirty = false;
    viewer.close();
    page.region = null;
    $("where").textContent = "no region";
    tell("");
    say("The region was given back; others may be asked about it. Your draft is kept in case you get it again.", [["Next region", () => attempt(advance)]]);
  }, release);
}

async function fromPrediction() {
  attempt(async () => {
    const voxels = await api.prediction(page.region.query);
    page.start = "prediction";
    viewer.edit(label => label.put(voxels));
  });
}

function between() {
  if (!page.region) return;
  viewer.settle();
  attempt(async () => {
    const {label: {voxels: before}, axis} = viewer, found = await api.between(page.region.query, before, axis);
    const plane = ["sagittal", "coronal", "axial"][axis], added = found.reduce((n, value, i) => n + (value !== before[i]), 0);
    viewer.edit(label => label.put(found));
    tell(added ? `${added} voxels filled between ${plane} slices`
      : `nothing to fill: draw each class on two ${plane} slices that overlap, with empty slices between`);
  });
}

// Drafts and leases: only while somebody works, so that the minutes of the ledger are those of work.
setInterval(async () => {
  if (!page.region || page.busy || document.hidden) return;
  const {query} = page.region, now = Date.now();
  try {
    if (page.unsent) {
      page.unsent = false;
      const kept = await api.keepDraft(query, page.client, viewer.label.voxels, page.start);
      page.renewed = now;
      let told = "draft kept";
      if (kept.status !== "open") told = await api.renew(query, page.client).then(
        () => "draft kept; the lease had run out and was renewed", error => `draft kept; ${error.message}`);
      if (page.region?.query === query) tell(told);
    } else if (now - page.active < 1000 * RENEW_SECONDS && now - page.renewed > 1000 * RENEW_SECONDS) {
      await api.renew(query, page.client);
      page.renewed = now;
    }
  } catch (error) {
    page.unsent = page.unsent || (error.status === 0 && page.dirty);
    if (page.region?.query === query) tell(`draft kept in this browser only: ${error.message}`);
  }
}, 1000 * DRAFT_SECONDS);
for (const event of ["pointermove", "keydown", "wheel"]) window.addEventListener(event, () => { page.active = Date.now(); }, {passive: true});
window.addEventListener("beforeunload", event => { if (page.dirty || page.storing.size) event.preventDefault(); });

// --- tools ---------------------------------------------------------------------------------------------------------

function setClasses(classes) {
  $("classes").replaceChildren(...classes.map((found, i) => {
    const swatch = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    swatch.setAttribute("viewBox", "0 0 10 10");
    const square = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of Object.entries({width: 10, height: 10, rx: 2, fill: `rgb(${colour(i).join(",")})`})) square.setAttribute(name, value);
    swatch.append(square);
    const button = h("button", {role: "radio", "data-value": found.value}, swatch, found.name, i < 9 ? h("kbd", {}, String(i + 1)) : null);
    button.addEventListener("click", () => pick(viewer.tool === "erase" || viewer.tool === "look" ? "pen" : viewer.tool, found.value));
    return button;
  }));
  if (!classes.some(found => found.value === viewer.value)) viewer.value = classes[0].value;
  pick(viewer.tool, viewer.value);
}

function pick(tool, value = viewer.value) {
  viewer.choose(tool, value);
  for (const button of $("tools").children) button.setAttribute("aria-checked", String(button.dataset.tool === tool));
  for (const button of $("classes").children) button.setAttribute("aria-checked", String(Number(button.dataset.value) === value));
}

for (const button of $("tools").children) button.addEventListener("click", () => pick(button.dataset.tool));
function resize(size) {
  $("size").value = size;
  $("size-told").textContent = $("size").value;
  viewer.brush = Number($("size").value);
}
$("size").addEventListener("input", () => resize($("size").value));
$("opacity").addEventListener("input", () => { viewer.opacity = Number($("opacity").value); });
$("window").replaceChildren(...Object.keys(WINDOWS).map(name => h("option", {}, name)));
$("window").addEventListener("change", () => { viewer.window = WINDOWS[$("window").value]; });
$("canvas").addEventListener("pointerdown", () => { viewer.pressed = true; });
const actions = {
  submit, skip, release, undo: () => viewer.edit(label => label.undo()), redo: () => viewer.edit(label => label.redo()),
  copy: () => viewer.edit(label => label.copy(viewer.voxel, viewer.axis)),
  between,
  clear: () => viewer.edit(label => label.put(new Uint8Array(label.voxels.length))),
  "from-nothing": () => { page.start = "nothing"; viewer.edit(label => label.put(new Uint8Array(label.voxels.length))); },
  "from-prediction": fromPrediction,
};
for (const [id, act] of Object.entries(actions)) $(id).addEventListener("click", act);

new Keys({
  tool: pick, class: place => { const found = page.region?.classes[place]; if (found) pick(["erase", "look"].includes(viewer.tool) ? "pen" : viewer.tool, found.value); },
  size: by => resize(Number($("size").value) + by), dot: () => viewer.dot(), shift: (a, b) => viewer.shift(a, b), slice: by => viewer.move(by), help: () => $("help").showModal(), ...actions,
}, $("help").querySelector("dl"));

// --- people and project --------------------------------------------------------------------------------------------

function asked(id) {
  const dialog = $(id);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise(resolve => dialog.addEventListener("close", () => resolve(dialog.returnValue), {once: true}));
}

async function askName(secret = false) {
  const dialog = $("name"), form = dialog.querySelector("form");
  form.elements.name.value = page.client || localStorage.getItem("patchwise-client") || "";
  $("secret").hidden = !secret;
  await asked("name");
  const before = page.client;
  page.client = form.elements.name.value.trim();
  if (page.client !== before) {
    page.past.clear();
    page.prefetched = null;
  }
  if (!page.client) return askName(secret);
  if (secret) {
    try { await api.signIn(page.client, form.elements.password.value); $("refused").textContent = ""; }
    catch { $("refused").textContent = "User or password were not accepted."; return askName(true); }
  }
  localStorage.setItem("patchwise-client", page.client);
  $("who").textContent = page.client;
  begin();
}
$("who").addEventListener("click", () => askName());
$("help-open").addEventListener("click", () => $("help").showModal());
$("train").addEventListener("click", () => attempt(async () => {
  await api.train(page.bundle);
  tell("training has started; its state is on the progress page");
}));

$("answers-open").addEventListener("click", () => attempt(async () => {
  const mine = (await api.answers()).filter(answer => answer.client === page.client).reverse();
  $("answers").querySelector(".scroll").replaceChildren(...(mine.length ? mine.map(answer => {
    const act = h("button", {type: "button"}, answer.active ? "Withdraw" : "Restore");
    act.addEventListener("click", () => attempt(async () => {
      await (answer.active ? api.withdraw : api.restore)(answer.answer, page.client);
      answer.active = !answer.active;
      act.textContent = answer.active ? "Withdraw" : "Restore";
    }));
    return h("div", {}, h("span", {class: "grow"}, `${answer.image}, ${new Date(answer.submitted).toLocaleString()}`), act);
  }) : [h("p", {class: "soft"}, "No answer yet.")]));
  if (!$("answers").open) $("answers").showModal();
}));

async function begin() {
  attempt(async () => {
    const found = await api.info();
    page.bundle = Object.keys(found.trainers)[0];
    if (!$("strategy").children.length) {
      $("strategy").replaceChildren(...Object.keys(found.strategies).map(name => h("option", {}, name)));
      const kept = localStorage.getItem("patchwise-strategy");
      if (kept in found.strategies) $("strategy").value = kept;
      else if (!found.patchwise.model && "random" in found.strategies) $("strategy").value = "random";
    }
    await advance();
  }, begin);
}
$("strategy").addEventListener("change", () => { localStorage.setItem("patchwise-strategy", $("strategy").value); page.prefetched = null; });

// The viewer is not part of the project, so it may be missing; the server knows what to do then.
async function loadViewer() {
  try {
    const {Viewer} = await import("./viewer.js");
    viewer = new Viewer($("canvas"), $("frame"), drawn);
  } catch {
    await api.viewerFile();
    throw new Error("The viewer could not be loaded; load the page again.");
  }
  try { await viewer.attach(); }
  catch { throw new Error("This browser offers no WebGL 2, which the viewer needs. Another browser or a newer graphics driver helps."); }
}

async function start() {
  enable();
  try { await loadViewer(); } catch (error) { return say(error.message, [], true); }
  resize(1);
  window.viewer = viewer;
  askName();
}
start();
