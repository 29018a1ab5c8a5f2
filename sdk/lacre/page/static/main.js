/** The page: puts the parts together, and draws the open chat. */

import { claim } from "./api.js";
import { Composer } from "./composer.js";
import { announce, coded, h, icon, iconButton, toast } from "./dom.js";
import { edit, message, piece } from "./message.js";
import { lockLine, showProof } from "./proof.js";
import { Session } from "./session.js";
import { modelOptions, showSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { useTheme } from "./theme.js";
import { path, totals } from "./tree.js";

const NEAR = 80; // px from the end of the chat: the view then follows an arriving answer

useTheme();
const session = new Session();
const composer = new Composer(session, (text, files) => session.send(text, files));
const sidebar = new Sidebar(session, { fresh, opened, settings: () => showSettings(session) });

const title = h("input", { class: "title", "aria-label": "Title of the chat", maxlength: "200", onchange: () => session.rename(title.value) });
const models = h("select", { class: "models", "aria-label": "Model", onchange: () => session.set({ model: models.value }) });
const lock = h("button", { type: "button", class: "lock", onclick: () => showProof(session.state, session.newest) });
const sums = h("span", { class: "sums" });
const log = h("div", { class: "log", role: "log", "aria-live": "off", "aria-label": "Conversation", tabindex: "0" });
const trouble = h("div", { class: "trouble", role: "alert", hidden: true });
const toEnd = iconButton("down", "To the end", () => follow(true), { class: "icon-button to-end", hidden: true });

document.getElementById("app").append(
  sidebar.element,
  sidebar.shade,
  h(
    "main",
    { class: "main" },
    h("h1", { class: "hidden-text" }, "Lacre chat"),
    h(
      "header",
      { class: "head" },
      iconButton("menu", "Chats", () => sidebar.toggle(), { class: "icon-button menu", "aria-controls": "sidebar" }),
      title,
      h("div", { class: "head-right" }, models, lock),
    ),
    trouble,
    log,
    h("div", { class: "foot" }, toEnd, composer.element, h("p", { class: "foot-note" }, sums, h("span", {}, "Models make mistakes. Check what matters."))),
  ),
);

const acts = {
  again: (node) => session.reply(session.chat.nodes[node.parent]),
  send: (text, files, parent) => session.send(text, files, parent),
  proof: (facts) => showProof(session.state, facts),
  redraw: () => draw(),
};

function fresh() {
  sidebar.toggle(false);
  session.begun();
  composer.focus();
}

async function opened(id) {
  await session.show(id).catch((error) => session.tell("trouble", { error }));
  composer.focus();
}

/** Draws the open chat. A question that is being edited stays so. */
function draw() {
  const open = log.querySelector(".edit-area");
  const editing = open && { node: open.closest("[data-node]").dataset.node, text: open.value };
  const nodes = path(session.chat);
  log.replaceChildren(nodes.length ? h("div", { class: "messages" }, ...nodes.map((node) => message(session, node, acts))) : welcome());
  if (editing) edit(log.querySelector(`[data-node="${editing.node}"]`), editing.text);
  heading();
  composer.show();
  sidebar.draw();
}

function heading() {
  title.value = session.chat.title;
  document.title = `${session.chat.title} · Lacre`;
  models.replaceChildren(...modelOptions(session.state, session.chat));
  const checked = session.newest?.verification ?? session.state.verification;
  const { shape, text, more } = lockLine(checked, session.state.error);
  lock.className = `lock ${shape}`;
  lock.replaceChildren(icon(shape), h("span", {}, text, h("span", { class: "lock-more" }, more)));
  lock.setAttribute("aria-label", `${text}${more}. Show what was verified`);
  const { tokens, cost } = totals(session.chat);
  const spent = cost === null ? "" : ` · ${cost.toFixed(6).replace(/0+$/, "").replace(/\.$/, "")} spent`;
  sums.textContent = tokens ? `${tokens.toLocaleString()} tokens in this chat${spent}` : "";
}

function welcome() {
  const sealed = session.state.verification?.manifest;
  const told = sealed
    ? "What you write is sealed on this computer. Only a worker of the pool can open it. The gateway in between cannot."
    : "What you write is sealed on this computer before it leaves. First, the gateway's manifest must be verified.";
  return h(
    "div",
    { class: "welcome" },
    h("img", { src: "/page/seal.svg", alt: "", width: "64", height: "64" }),
    h("h2", {}, "What would you like to ask?"),
    h("p", {}, told),
    h("button", { type: "button", class: "button", onclick: () => showProof(session.state, null) }, icon(sealed ? "lock" : "unlocked"), "See what was verified"),
  );
}

// Following the end

const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;

function follow(always = false) {
  if (always) log.scrollTop = log.scrollHeight;
  toEnd.hidden = atEnd();
}

log.addEventListener("scroll", () => (toEnd.hidden = atEnd()), { passive: true });

// What the session tells

session.addEventListener("chat", ({ detail }) => {
  const end = !detail.kept && (atEnd() || detail.arriving || !detail.settled);
  const focused = log.contains(document.activeElement) && !log.querySelector(".edit-area");
  draw();
  if (focused) log.focus();
  follow(end);
  if (detail.arriving) announce("The answer arrives.");
});
session.addEventListener("piece", ({ detail: { arriving, line } }) => {
  if (arriving.chat !== session.chat) return;
  const element = log.querySelector(`[data-node="${arriving.node.id}"]`);
  if (!element) return;
  const end = atEnd();
  piece(element, arriving, line);
  follow(end);
});
session.addEventListener("settled", ({ detail: { chat, node } }) => {
  if (chat !== session.chat) toast(`The answer in “${chat.title}” is there.`);
  else if (node.state === "done") announce(`Answer: ${node.text.slice(0, 2000)}`);
  else if (node.state === "stopped") announce("Stopped.");
  composer.busy();
  sidebar.draw();
});
session.addEventListener("settings", () => [heading(), sidebar.draw()]);
session.addEventListener("state", () => draw());
session.addEventListener("list", () => sidebar.draw());
session.addEventListener("edit", ({ detail: { node } }) => edit(log.querySelector(`[data-node="${node.id}"]`)));
session.addEventListener("trouble", ({ detail: { error } }) => shown(error));

/** An error that belongs to no answer. */
function shown(error) {
  const text = [error.message, error.remedy].filter(Boolean).join(" ");
  if (document.querySelector("dialog[open]")) return toast(text, "error");
  const close = iconButton("close", "Close", () => (trouble.hidden = true), { class: "icon-button small" });
  trouble.replaceChildren(h("span", {}, ...coded(text)), close);
  trouble.hidden = false;
  return undefined;
}

// Keys

document.addEventListener("keydown", (event) => {
  const plain = event.altKey && !event.ctrlKey && !event.metaKey;
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
    event.preventDefault();
    if (getComputedStyle(document.querySelector(".menu")).display !== "none") sidebar.toggle(true);
    sidebar.search.focus();
  } else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (document.body.classList.contains("drawer")) sidebar.toggle(false);
    else session.stop();
  } else if (plain && event.code === "KeyN") [event.preventDefault(), fresh()];
  else if (plain && event.code === "KeyL") [event.preventDefault(), showProof(session.state, session.newest)];
  else if (plain && event.code === "Comma") [event.preventDefault(), showSettings(session)];
});

addEventListener("beforeunload", (event) => {
  if (session.unkept.size > 0 || session.arriving || log.querySelector(".edit-area")) {
    for (const id of session.unkept) session.keep(session.chats.get(id));
    event.preventDefault();
  }
});

draw();
try {
  await claim();
  await session.begin();
  composer.focus();
} catch (error) {
  shown(error);
}
