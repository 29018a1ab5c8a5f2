/**
 * Makes elements. Text only ever becomes text: nothing here parses HTML, and the page's policy forbids it.
 */

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element. `on…` are listeners, `class`, `aria-…` and the like attributes; undefined, null and false are left off.
 * @param {string} tag @param {Record<string, any>} given @param {...(Node | string | null | undefined | false)} children
 */
export function h(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Text whose commands stand between backticks, as errors write them: they become code. @param {string} text */
export function coded(text) {
  const parts = text.split("`");
  if (parts.length % 2 === 0) return [text]; // one of them has no other
  return parts.map((part, i) => (i % 2 === 1 ? h("code", {}, part) : part));
}

const ICONS = {
  menu: ["M4 7h16M4 12h16M4 17h16"],
  plus: ["M12 5v14M5 12h14"],
  search: ["M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14z", "M20 20l-4-4"],
  lock: ["M6 11h12v9H6z", "M8.5 11V8a3.5 3.5 0 0 1 7 0v3"],
  unlocked: ["M6 11h12v9H6z", "M8.5 11V7a3.5 3.5 0 0 1 6.6-1.6"],
  send: ["M12 19V5", "M6 11l6-6 6 6"],
  stop: ["M7 7h10v10H7z"],
  clip: ["M20 11l-8.5 8.5a5 5 0 0 1-7-7L13 4a3.4 3.4 0 0 1 4.8 4.8L9.5 17a1.8 1.8 0 0 1-2.5-2.5L14.5 7"],
  copy: ["M9 9h11v11H9z", "M5 15H4V4h11v1"],
  check: ["M5 12.5l4.5 4.5L19 7.5"],
  redo: ["M19 12a7 7 0 1 1-2-4.9L20 10", "M20 4v6h-6"],
  edit: ["M4 20h4L19 9l-4-4L4 16z", "M13 7l4 4"],
  left: ["M14 6l-6 6 6 6"],
  right: ["M10 6l6 6-6 6"],
  trash: ["M5 7h14M10 4h4M7 7l1 13h8l1-13M10 11v5M14 11v5"],
  settings: ["M4 7h9M17 7h3M4 17h3M11 17h9", "M15 5a2 2 0 1 0 0 4 2 2 0 0 0 0-4z", "M9 15a2 2 0 1 0 0 4 2 2 0 0 0 0-4z"],
  close: ["M6 6l12 12M18 6L6 18"],
  keyboard: ["M3 7h18v10H3z", "M7 14h10M7 10h.01M11 10h.01M15 10h.01"],
  down: ["M12 5v14M6 13l6 6 6-6"],
  file: ["M7 3h7l4 4v14H7z", "M14 3v4h4"],
  sun: ["M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8z", "M12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.5 1.5M17.5 17.5L19 19M5 19l1.5-1.5M17.5 6.5L19 5"],
};

/** @param {keyof typeof ICONS} name */
export function icon(name) {
  const drawn = document.createElementNS(SVG, "svg");
  for (const [key, value] of Object.entries({ viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true", focusable: "false" })) {
    drawn.setAttribute(key, value);
  }
  for (const d of ICONS[name]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", d);
    drawn.append(path);
  }
  return drawn;
}

/** A button with an icon; its name is for screen readers and the tooltip. */
export function iconButton(name, label, onclick, given = {}) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...given }, icon(name));
}

/** Says something to screen readers. */
export function announce(text) {
  const status = document.getElementById("status");
  if (status) status.textContent = text;
}

/** A short message at the lower edge, which goes by itself. */
export function toast(text, kind = "note") {
  document.querySelector(".toast")?.remove();
  const shown = h("div", { class: `toast ${kind}` }, text);
  (document.querySelector("dialog[open]") ?? document.body).append(shown); // an open dialog covers everything else
  announce(text);
  setTimeout(() => shown.remove(), kind === "error" ? 10000 : 5000);
}

/** Copies, and shows that on the button. */
export async function copied(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    toast("The browser did not allow copying. Select the text instead.", "error");
    return;
  }
  announce("Copied");
  button.replaceChildren(icon("check"));
  setTimeout(() => button.replaceChildren(icon("copy")), 1500);
}

/** Saves text as a file of the person's choice. */
export function saved(name, text, type = "application/json") {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
