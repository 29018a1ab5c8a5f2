/**
 * One message: a person's, or an answer with its thoughts, seams, checks and errors.
 */

import { coded, copied, h, icon, iconButton } from "./dom.js";
import { built, redraw } from "./markdown.js";
import { place } from "./tree.js";

const FINISHES = {
  length: "The answer reached its token limit. Raise “Longest answer” in the settings, or ask it to go on.",
  content_filter: "The worker's filter ended the answer.",
};

/** @param {import("./session.js").Session} session @param {any} node @param {Record<string, Function>} acts */
export function message(session, node, acts) {
  return node.role === "user" ? question(session, node, acts) : reply(session, node, acts);
}

function question(session, node, acts) {
  const files = node.files ?? [];
  const element = h(
    "article",
    { class: "message user", "aria-label": "You", "data-node": node.id },
    files.length > 0 && h("div", { class: "files" }, ...files.map((file) => fileCard(file))),
    node.text && h("div", { class: "bubble" }, node.text),
    h(
      "div",
      { class: "actions" },
      branches(session, node),
      copyButton(() => node.text, "Copy question"),
      iconButton("edit", "Edit and branch", () => edited(session, element, node, acts), { class: "icon-button small", "data-edit": true }),
    ),
  );
  return element;
}

/** A file of a question. remove: only before it is sent. */
export function fileCard(file, remove) {
  const shown = file.kind === "image" ? h("img", { src: file.data, alt: "", class: "thumb" }) : icon("file");
  const off = remove && h("button", { type: "button", class: "icon-button small", "aria-label": `Remove ${file.name}`, onclick: remove }, icon("close"));
  return h("span", { class: "file" }, shown, h("span", { class: "file-name" }, file.name), off);
}

/** The question as a form. Sending it adds a branch; the old one stays. */
function edited(session, element, node, acts) {
  if (element.querySelector("form")) return;
  const area = h("textarea", { class: "edit-area", "aria-label": "Edit your question", rows: "3", value: node.text });
  const close = () => acts.redraw();
  const send = () => {
    if (!area.value.trim() && (node.files ?? []).length === 0) return;
    acts.send(area.value, node.files ?? [], node.parent);
  };
  const form = h(
    "form",
    { class: "edit", onsubmit: (event) => [event.preventDefault(), send()] },
    area,
    h("div", { class: "row end" }, h("button", { type: "button", class: "button", onclick: close }, "Cancel"), h("button", { type: "submit", class: "button primary" }, "Send as a new branch")),
  );
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") [event.stopPropagation(), close()];
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) [event.preventDefault(), send()];
  });
  const bubble = element.querySelector(".bubble");
  if (bubble) bubble.replaceWith(form);
  else element.prepend(form);
  element.classList.add("editing");
  area.focus();
}

/** Opens the form of a question, with a text that was typed there before. */
export function edit(element, text) {
  element?.querySelector("[data-edit]")?.click();
  const area = element?.querySelector(".edit-area");
  if (area && text !== undefined) area.value = text;
}

function reply(session, node, acts) {
  const arriving = session.arriving?.node === node ? session.arriving : null;
  const text = h("div", { class: "markdown" });
  const blocks = arriving ? arriving.blocks : (session.rendered.get(node.id) ?? []);
  text.append(...blocks.map((block) => built(block)));
  if (!arriving && blocks.length === 0 && node.text) text.append(h("p", { class: "plain" }, node.text));
  const element = h("article", { class: "message assistant", "aria-label": "Answer", "aria-busy": arriving ? "true" : "false", "data-node": node.id });
  element.append(h("div", { class: "thoughts-place" }), text, h("div", { class: "after" }));
  thoughts(element, node, arriving);
  if (arriving) waiting(element, node);
  else element.querySelector(".after").append(...after(session, node, acts));
  return element;
}

function thoughts(element, node, arriving) {
  if (!node.thought) return;
  const spot = element.querySelector(".thoughts-place");
  const body = spot.querySelector(".thought-text");
  if (body) {
    body.textContent = node.thought;
    spot.querySelector("summary").textContent = arriving && !node.text ? "Thinking…" : "Thoughts";
    return;
  }
  const title = arriving && !node.text ? "Thinking…" : "Thoughts";
  spot.append(h("details", { class: "thoughts" }, h("summary", {}, title), h("div", { class: "thought-text" }, node.thought)));
}

function waiting(element, node) {
  const after = element.querySelector(".after");
  if (!node.text && !after.firstChild) after.append(h("span", { class: "dots", "aria-hidden": "true" }, h("i"), h("i"), h("i")));
}

/** Draws one line of an arriving answer into its element. */
export function piece(element, { node, tail }, line) {
  const text = element.querySelector(".markdown");
  if (line.t === "thought") thoughts(element, node, true);
  if (line.t === "text") {
    if (node.thought) thoughts(element, node, true);
    element.querySelector(".after").replaceChildren();
    let end = text.querySelector(":scope > .tail");
    if (!end) text.append((end = h("span", { class: "tail" })));
    end.textContent = tail;
  }
  if (line.t === "blocks") {
    text.querySelector(":scope > .tail")?.remove();
    redraw(text, line.from, line.blocks);
  }
}

function after(session, node, acts) {
  const found = [];
  if (node.state === "failed" && node.error) found.push(failure(node, acts));
  else if (node.state === "stopped") found.push(h("p", { class: "quiet" }, node.text ? "You stopped this answer here." : "Stopped before the first word."));
  const why = FINISHES[node.facts?.finish];
  if (why) found.push(h("p", { class: "quiet" }, why));
  if (node.seams?.length > 0) {
    const times = node.seams.length === 1 ? "Another worker resumed this answer once" : `Other workers resumed this answer ${node.seams.length} times`;
    found.push(h("p", { class: "quiet resumed" }, `${times}, at the same token. The mark in the text shows where.`));
  }
  found.push(
    h(
      "div",
      { class: "actions" },
      branches(session, node),
      copyButton(() => node.text, "Copy answer"),
      iconButton("redo", "Ask again", () => acts.again(node), { class: "icon-button small" }),
      node.facts && proofButton(node, acts),
      node.facts && h("span", { class: "figures" }, figures(node.facts)),
    ),
  );
  return found;
}

function proofButton(node, acts) {
  const label = node.facts.imported ? "not checked here" : "verified";
  const shape = node.facts.imported ? "unlocked" : "lock";
  return h("button", { type: "button", class: `proof ${shape}`, "aria-label": `What was verified of this answer: ${label}`, onclick: () => acts.proof(node.facts) }, icon(shape), label);
}

export function figures(facts) {
  const told = [`${facts.usage?.completion ?? 0} tokens`];
  if (facts.rate) told.push(`${facts.rate} tokens/s`);
  if (facts.cost) told.push(`cost ${facts.cost}`);
  return told.join(" · ");
}

function failure(node, acts) {
  const { error } = node;
  return h(
    "div",
    { class: "failure", role: "alert" },
    h("p", { class: "failure-title" }, node.text ? "The answer broke off" : "No answer"),
    h("p", {}, ...coded(error.message)),
    error.remedy && h("p", { class: "remedy" }, ...coded(error.remedy)),
    h(
      "p",
      { class: "failure-foot" },
      h("code", {}, error.code ?? "failed"),
      error.request_id && h("span", {}, " request ", h("code", {}, error.request_id)),
    ),
    h("button", { type: "button", class: "button", onclick: () => acts.again(node) }, "Ask again"),
  );
}

function copyButton(text, label) {
  const button = iconButton("copy", label, () => copied(text(), button), { class: "icon-button small" });
  return button;
}

/** Which branch this is, with buttons to the others. */
function branches(session, node) {
  const { all, index } = place(session.chat, node);
  if (all.length < 2) return null;
  const go = (step, label, shape) =>
    iconButton(shape, label, () => session.choose(all[index + step]), { class: "icon-button small", disabled: index + step < 0 || index + step >= all.length });
  return h(
    "span",
    { class: "branches", role: "group", "aria-label": "Branches" },
    go(-1, "Previous branch", "left"),
    h("span", { class: "branch-count" }, `${index + 1} / ${all.length}`),
    go(1, "Next branch", "right"),
  );
}
