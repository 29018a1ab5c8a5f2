/**
 * Builds elements from the proxy's nodes: a text, or [tag, children, attributes]. Only what is listed here is built; any other node
 * shows as the text in it.
 */

import { copied, h, icon } from "./dom.js";

const PLAIN = new Set(
  "p h3 h4 h5 h6 ul ol li blockquote em strong s br hr thead tbody tr th td small".split(" "),
);
const LINKS = new Set(["http:", "https:", "mailto:"]);
const ALIGNED = new Set(["left", "center", "right"]);
const MAX_DEPTH = 60;

/** @param {any} node */
export function built(node, depth = 0) {
  if (typeof node === "string") return document.createTextNode(node);
  if (!Array.isArray(node) || depth > MAX_DEPTH) return document.createTextNode("");
  const [tag, children, given] = node;
  const inner = () => (Array.isArray(children) ? children : []).map((child) => built(child, depth + 1));
  if (tag === "seam") return seam();
  if (tag === "pre") return block(inner(), typeof given?.lang === "string" ? given.lang : "");
  if (tag === "code") return h("code", {}, ...inner());
  if (tag === "a") return link(given?.href, inner());
  if (tag === "table") return h("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, h("table", {}, ...inner()));
  if (!PLAIN.has(tag)) return h("span", {}, ...inner());
  const element = h(tag, {}, ...inner());
  if (tag === "ol" && Number.isInteger(given?.start)) element.setAttribute("start", String(given.start));
  if (ALIGNED.has(given?.align)) element.className = `align-${given.align}`;
  return element;
}

function link(target, children) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return h("span", {}, ...children);
  }
  if (!LINKS.has(url.protocol)) return h("span", {}, ...children);
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer", title: url.href }, ...children);
}

function block(children, lang) {
  const code = h("pre", { tabindex: "0", role: "group", "aria-label": lang ? `${lang} code` : "Code" }, ...children);
  const copy = h(
    "button",
    { type: "button", class: "icon-button small", "aria-label": "Copy code", title: "Copy code", onclick: () => copied(written(code), copy) },
    icon("copy"),
  );
  return h("div", { class: "code" }, h("div", { class: "code-head" }, h("span", {}, lang || "code"), copy), code);
}

/** The text of an element without the marks of seams in it. */
function written(element) {
  const copy = element.cloneNode(true);
  for (const mark of copy.querySelectorAll(".seam")) mark.remove();
  return copy.textContent.replace(/\n$/, "");
}

function seam() {
  const told = "Another worker resumed the answer here";
  return h("span", { class: "seam", role: "img", "aria-label": told, title: told }, h("span", { class: "seam-text", "aria-hidden": "true" }, "resumed"));
}

/** Replaces the blocks of an element from the given one on. */
export function redraw(element, from, nodes) {
  while (element.childNodes.length > from) element.lastChild.remove();
  element.append(...nodes.map((node) => built(node)));
}
