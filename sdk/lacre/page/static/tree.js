/**
 * A chat as a tree: editing a question or asking again adds a branch, and nothing is replaced. No elements and no requests here.
 *
 * A chat: { id, title, created, updated, named, draft, system, model, params, nodes, pick }. A node: { id, parent, role, text, at,
 * … }; `pick` has the chosen child of each node, and of "" the chosen first one.
 */

export const FORMAT = "lacre-chats";
const MAX_NODES = 5000;
const ID = /^[0-9a-f]{32}$/;
const ROLES = new Set(["user", "assistant"]);
const STATES = new Set(["done", "stopped", "failed"]);
const PARAMS = { temperature: "number", top_p: "number", max_tokens: "number", seed: "number", stop: "string" };

export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newChat(defaults = {}) {
  const now = Date.now() / 1000;
  return {
    id: newId(), title: "New chat", named: false, created: now, updated: now, draft: { text: "", files: [] },
    system: defaults.system ?? "", model: defaults.model ?? "", params: { ...defaults.params }, nodes: {}, pick: {},
  };
}

export function children(chat, parent) {
  return Object.values(chat.nodes).filter((node) => node.parent === parent);
}

/** The nodes that are shown, from the first one on. */
export function path(chat) {
  const found = [];
  let at = "";
  while (found.length <= MAX_NODES) {
    const below = children(chat, at);
    if (below.length === 0) break;
    const next = below.find((node) => node.id === chat.pick[at]) ?? below[below.length - 1];
    found.push(next);
    at = next.id;
  }
  return found;
}

/** Adds a node below `parent` and shows it. */
export function add(chat, parent, node) {
  const made = { id: newId(), parent, text: "", at: Date.now() / 1000, ...node };
  chat.nodes[made.id] = made;
  chat.pick[parent] = made.id;
  touch(chat);
  return made;
}

export function touch(chat) {
  chat.updated = Date.now() / 1000;
  if (chat.named) return;
  const first = path(chat).find((node) => node.role === "user");
  if (first) chat.title = titled(first.text || first.files?.[0]?.name || "");
}

function titled(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return (line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line) || "New chat";
}

/** Which of its siblings a node is, and how many there are. */
export function place(chat, node) {
  const all = children(chat, node.parent);
  return { all, index: all.findIndex((each) => each.id === node.id) };
}

export function choose(chat, node) {
  chat.pick[node.parent] = node.id;
}

/** The question up to a node, as OpenAI's messages. */
export function messages(chat, until) {
  const told = chat.system.trim() ? [{ role: "system", content: chat.system }] : [];
  for (const node of path(chat)) {
    if (node.role === "user") told.push({ role: "user", content: content(node) });
    else if (node.text) told.push({ role: "assistant", content: node.text });
    if (node.id === until) break;
  }
  return told;
}

/** Text files stand before the text, each between fences; pictures are parts of their own. */
function content(node) {
  const files = node.files ?? [];
  const texts = files.filter((file) => file.kind === "text").map((file) => fenced(file));
  const text = [...texts, node.text].filter(Boolean).join("\n\n");
  const pictures = files.filter((file) => file.kind === "image");
  if (pictures.length === 0) return text;
  return [{ type: "text", text }, ...pictures.map((file) => ({ type: "image_url", image_url: { url: file.data } }))];
}

function fenced(file) {
  const longest = Math.max(2, ...Array.from(file.data.matchAll(/`+/g), (found) => found[0].length));
  const fence = "`".repeat(longest + 1);
  return `File ${file.name}:\n${fence}\n${file.data}\n${fence}`;
}

export function params(chat) {
  const given = Object.entries(chat.params).filter(([, value]) => value !== null && value !== "");
  return Object.fromEntries(given);
}

/** Tokens and cost of all answers of a chat, those of other branches too: they were paid for. */
export function totals(chat) {
  let [tokens, micro, priced] = [0, 0, false];
  for (const node of Object.values(chat.nodes)) {
    tokens += node.facts?.usage?.total ?? 0;
    if (node.facts?.cost) [micro, priced] = [micro + Math.round(Number(node.facts.cost) * 1e6), true];
  }
  return { tokens, cost: priced ? micro / 1e6 : null };
}

export function exported(chats) {
  return JSON.stringify({ format: FORMAT, version: 1, chats }, null, 1);
}

/** The chats of an export, each member checked, under new ids. Raises Error. */
export function imported(text) {
  let told;
  try {
    told = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON. Choose a file that Export wrote.");
  }
  if (told?.format !== FORMAT || told.version !== 1 || !Array.isArray(told.chats)) {
    throw new Error("This file is not an export of this page. Choose a file that Export wrote.");
  }
  return told.chats.map((each) => {
    const chat = { ...checked(each), id: newId() };
    // Anyone can write a file: what it says about checks was not checked here.
    for (const node of Object.values(chat.nodes)) if (node.facts) node.facts.imported = true;
    return chat;
  });
}

/** A chat with nothing in it but what a chat has. Raises Error. */
export function checked(told) {
  if (!told || typeof told !== "object" || typeof told.nodes !== "object" || !told.nodes) throw new Error("A chat in it has no messages.");
  const nodes = Object.values(told.nodes);
  if (nodes.length > MAX_NODES) throw new Error(`A chat in it has over ${MAX_NODES} messages.`);
  const chat = newChat();
  Object.assign(chat, {
    id: ID.test(told.id) ? told.id : chat.id, title: text(told.title).slice(0, 200) || "New chat", named: told.named === true,
    created: number(told.created), updated: number(told.updated), system: text(told.system), model: text(told.model),
    draft: { text: text(told.draft?.text), files: files(told.draft?.files) },
  });
  for (const [name, kind] of Object.entries(PARAMS)) if (typeof told.params?.[name] === kind) chat.params[name] = told.params[name];
  for (const node of nodes) if (node && ID.test(node.id) && ROLES.has(node.role)) chat.nodes[node.id] = checkedNode(node);
  for (const node of Object.values(chat.nodes)) {
    if (node.parent !== "" && !chat.nodes[node.parent]) throw new Error("A message in it belongs to no other.");
  }
  for (const [parent, child] of Object.entries(told.pick ?? {})) if (chat.nodes[child]?.parent === parent) chat.pick[parent] = child;
  return chat;
}

function checkedNode(node) {
  const known = {
    id: node.id, parent: ID.test(node.parent) ? node.parent : "", role: node.role, text: text(node.text), at: number(node.at),
    files: files(node.files),
  };
  if (node.role === "user") return known;
  return {
    ...known, state: STATES.has(node.state) ? node.state : "stopped", thought: text(node.thought), model: text(node.model),
    seams: Array.isArray(node.seams) ? node.seams.filter(Number.isInteger).slice(0, 32) : [],
    error: object(node.error), facts: object(node.facts), made: node.made === true,
  };
}

function files(value) {
  if (!Array.isArray(value)) return [];
  const fit = (file) => file && typeof file.name === "string" && typeof file.data === "string";
  const kind = (file) => (file.kind === "image" && /^data:image\/(png|jpeg|webp|gif);base64,/.test(file.data) ? "image" : "text");
  return value.filter(fit).map((file) => ({ name: file.name.slice(0, 200), kind: kind(file), data: file.data }));
}

const text = (value) => (typeof value === "string" ? value : "");
const number = (value) => (Number.isFinite(value) ? value : Date.now() / 1000);
const object = (value) => (value && typeof value === "object" && !Array.isArray(value) ? value : null);
