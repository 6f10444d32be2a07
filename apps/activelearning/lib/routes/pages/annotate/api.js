// Requests to the server. Everything it refuses arrives as an Error whose message is its sentence.

let token = sessionStorage.getItem("patchwise-token");

export class Refused extends Error {
  constructor(status, sentence) { super(sentence); this.status = status; }
}

async function send(path, options = {}) {
  const headers = {...(options.headers || {}), ...(token ? {Authorization: `Bearer ${token}`} : {})};
  let reply;
  try {
    reply = await fetch(new URL(path, location.href), {...options, headers, cache: "no-store"});
  } catch {
    throw new Refused(0, "The server does not answer. What you drew is kept in this browser.");
  }
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => ({}));
  throw new Refused(reply.status, typeof told.detail === "string" ? told.detail : `The server answered with status ${reply.status}.`);
}

const json = (method, body) => ({method, headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});
const mine = client => `client_id=${encodeURIComponent(client)}`;
const packed = (method, body) => ({method, headers: {"Content-Type": "application/gzip"}, body});

export async function signIn(username, password) {
  const reply = await send("../auth/token", {method: "POST", body: new URLSearchParams({username, password})});
  token = (await reply.json()).access_token;
  sessionStorage.setItem("patchwise-token", token);
}

export const viewerFile = async () => send("assets/niivue.js");
export const info = async () => (await send("../info/")).json();
export const held = async client => (await send(`regions?${mine(client)}`)).json();
export const next = async (client, strategy) =>
  (await send(`../activelearning/${encodeURIComponent(strategy)}`, json("POST", {client_id: client, batch: 1}))).json();
export const region = async (query, client) => (await send(`regions/${query}?${mine(client)}`)).json();
export const image = async query => (await send(`regions/${query}/image.nii`)).arrayBuffer();
export const renew = async (query, client) => send("../activelearning/renew", json("POST", {query, client_id: client}));
export const release = async (query, client) => send("../activelearning/release", json("POST", {query, client_id: client}));
export const skip = async (query, client, reason) =>
  send("../activelearning/skip", json("POST", {query, client_id: client, reason: reason || null}));
export const train = async bundle => send(`../train/${encodeURIComponent(bundle)}`, json("POST", {}));
export const answers = async () => (await send("answers")).json();
export const withdraw = async (answer, client) => send(`answers/${answer}/withdraw`, json("POST", {client_id: client}));
export const restore = async (answer, client) => send(`answers/${answer}/restore`, json("POST", {client_id: client}));

export async function gunzip(buffer) {
  const stream = new Blob([buffer]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

export async function gzip(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

export async function prediction(query) {
  return gunzip(await (await send(`regions/${query}/prediction`)).arrayBuffer());
}

export async function draft(query, client) {
  const reply = await send(`regions/${query}/draft?${mine(client)}`);
  if (reply.status === 204) return null;
  return {voxels: await gunzip(await reply.arrayBuffer()), start: reply.headers.get("X-Patchwise-Start")};
}

export const between = async (query, bytes, axis) =>
  gunzip(await (await send(`regions/${query}/between?axis=${axis}`, packed("POST", await gzip(bytes)))).arrayBuffer());

export const keepDraft = async (query, client, bytes, start) =>
  (await send(`regions/${query}/draft?${mine(client)}&start=${start}`, packed("PUT", await gzip(bytes)))).json();

export const answer = async (query, client, bytes, start) =>
  (await send(`regions/${query}/label?${mine(client)}&start=${start}`, packed("PUT", await gzip(bytes)))).json();
