/** The settings: of this chat, of the page, and of what is kept. */

import { asked } from "./api.js";
import { confirmed, dialog } from "./dialog.js";
import { copied, h, iconButton, saved, toast } from "./dom.js";
import { remark } from "./sidebar.js";
import { theme, useTheme } from "./theme.js";

const NUMBERS = [
  ["temperature", "Temperature", "0 is steady, 1 is lively", { min: 0, max: 2, step: 0.1 }],
  ["top_p", "Top p", "the share of likely words to choose from", { min: 0, max: 1, step: 0.05 }],
  ["max_tokens", "Longest answer", "in tokens", { min: 1, max: 1000000, step: 1 }],
  ["seed", "Seed", "repeats an answer, if the worker can", { min: 0, max: 2147483647, step: 1 }],
];

/** @param {import("./session.js").Session} session */
export function showSettings(session) {
  const act = (work) => work().catch((error) => session.tell("trouble", { error }));
  const body = h("div", { class: "settings" });
  const shown = dialog("Settings", body, { wide: true });
  const draw = () => body.replaceChildren(ofChat(session), look(), history(session, act, draw), files(session, act, shown), elsewhere(act), keys());
  draw();
}

function section(title, ...children) {
  return h("section", {}, h("h3", {}, title), ...children);
}

function labelled(label, hint, input) {
  return h("label", { class: "field" }, h("span", { class: "field-label" }, label, hint && h("span", { class: "hint" }, hint)), input);
}

function ofChat(session) {
  const { chat, state } = session;
  const model = h("select", { class: "input", onchange: () => session.set({ model: model.value }) }, ...modelOptions(state, chat));
  const system = h("textarea", { class: "input", rows: "3", placeholder: "How the model should answer", value: chat.system, oninput: () => session.set({ system: system.value }) });
  const numbers = NUMBERS.map(([name, label, hint, bounds]) => {
    const input = h("input", { class: "input", type: "number", inputmode: "decimal", placeholder: "the model's own", ...bounds, value: chat.params[name] ?? "" });
    input.addEventListener("change", () => {
      if (!input.checkValidity()) return input.reportValidity();
      session.set({ params: { ...session.chat.params, [name]: input.value === "" ? null : Number(input.value) } });
      return undefined;
    });
    return labelled(label, hint, input);
  });
  return section("This chat", labelled("Model", "", model), labelled("System prompt", "sealed with every message of this chat", system), h("div", { class: "grid" }, ...numbers));
}

/** The options of a list of models. The chat's own stays in it, even if the manifest no longer names it. */
export function modelOptions({ models }, { model }) {
  const [first, ...others] = models;
  if (model && !models.includes(model)) others.push(model);
  const chosen = model === first ? "" : model;
  const named = first ? `${first} (default)` : "default model";
  return [["", named], ...others.map((name) => [name, name])].map(([value, label]) => h("option", { value, selected: value === chosen }, label));
}

function look() {
  const choices = [["system", "As the system"], ["light", "Light"], ["dark", "Dark"]];
  const made = choices.map(([value, label]) => {
    const input = h("input", { type: "radio", name: "theme", value, checked: theme() === value, onchange: () => useTheme(value) });
    return h("label", { class: "choice" }, input, label);
  });
  return section("Appearance", h("div", { class: "row", role: "radiogroup", "aria-label": "Theme" }, ...made));
}

function history(session, act, draw) {
  const { history: kept } = session.state;
  const change = (content) => act(() => session.openHistory(content).then(draw));
  const parts = [h("p", {}, remark(kept))];
  if (kept.state === "off") {
    parts.push(h("p", { class: "hint" }, "You can keep chats in encrypted files that only you can open. Choose where the key is."));
    if (kept.keyring) parts.push(h("button", { type: "button", class: "button", onclick: () => change({ kind: "keyring" }) }, "Keep chats; key in the system's keyring"));
    parts.push(passphrase("Keep chats; key from a passphrase", "new-password", (text) => change({ kind: "passphrase", passphrase: text })));
    parts.push(h("p", { class: "hint" }, "Nobody can restore a forgotten passphrase."));
  }
  if (kept.state === "locked") {
    if (kept.kind === "keyring") parts.push(h("button", { type: "button", class: "button", onclick: () => change({ kind: "open" }) }, "Open with the keyring"));
    else parts.push(passphrase("Open the history", "current-password", (text) => change({ kind: "open", passphrase: text })));
  }
  if (kept.unreadable?.length > 0) {
    const rows = kept.unreadable.map((file) => h("li", {}, h("code", {}, file.name), `: ${file.reason}`));
    parts.push(h("div", { class: "failure" }, h("p", {}, `These files in ${kept.folder} were not used. Delete them, or restore them from a backup.`), h("ul", {}, ...rows)));
  }
  const forget = async () => {
    const text = "This deletes every chat of this page: those in memory, the encrypted files, and their key. It cannot be undone.";
    if (await confirmed("Delete all chats?", text, "Delete everything")) await act(() => session.forget().then(draw));
  };
  parts.push(h("button", { type: "button", class: "button danger", onclick: forget }, "Delete all chats"));
  return section("History", ...parts);
}

function passphrase(label, autocomplete, use) {
  const input = h("input", { class: "input", type: "password", minlength: "8", required: true, autocomplete, "aria-label": "Passphrase", placeholder: "Passphrase" });
  const form = h("form", { class: "row", onsubmit: (event) => [event.preventDefault(), use(input.value)] }, input, h("button", { type: "submit", class: "button" }, label));
  return form;
}

function files(session, act, shown) {
  const picker = h("input", { type: "file", accept: "application/json,.json", class: "hidden-input", tabindex: "-1", "aria-label": "Import chats" });
  picker.addEventListener("change", () =>
    act(async () => {
      const [file] = picker.files;
      if (!file) return;
      const count = await session.import(await file.text());
      toast(count === 1 ? "Imported a chat." : `Imported ${count} chats.`);
      shown.close();
    }),
  );
  const save = (all) => act(async () => saved(all ? "lacre-chats.json" : "lacre-chat.json", await session.export(all)));
  return section(
    "Import and export",
    h("p", { class: "hint" }, "An export is not encrypted. Pictures and the checks of each answer are in it."),
    h(
      "div",
      { class: "row" },
      h("button", { type: "button", class: "button", onclick: () => save(false) }, "Export this chat"),
      h("button", { type: "button", class: "button", onclick: () => save(true) }, "Export all chats"),
      h("button", { type: "button", class: "button", onclick: () => picker.click() }, "Import"),
      picker,
    ),
  );
}

function elsewhere(act) {
  const spot = h("div", {});
  const make = () =>
    act(async () => {
      const { link } = await asked("link", { method: "POST", content: {} });
      const copy = iconButton("copy", "Copy the link", () => copied(link, copy), { class: "icon-button small" });
      spot.replaceChildren(h("p", { class: "row" }, h("code", { class: "wrap" }, link), copy), h("p", { class: "hint" }, "It works once, for ten minutes, in a browser on this computer."));
    });
  return section("Another browser", h("button", { type: "button", class: "button", onclick: make }, "Make a link"), spot);
}

const KEYS = [
  ["Enter", "send"], ["Shift + Enter", "new line"], ["Escape", "stop the answer, or close"], ["↑ in an empty message", "edit your last question"],
  ["Ctrl or ⌘ + K", "search chats"], ["Alt + N", "new chat"], ["Alt + L", "what was verified"], ["Alt + ,", "settings"],
];

function keys() {
  return section("Keyboard", h("dl", { class: "keys" }, ...KEYS.map(([key, does]) => h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, does)))));
}
