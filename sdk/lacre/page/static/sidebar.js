/** The list of chats: search, open, delete. On a phone it is a drawer. */

import { asked } from "./api.js";
import { confirmed } from "./dialog.js";
import { h, icon, iconButton } from "./dom.js";

const SEARCH_AFTER = 200; // ms

export class Sidebar {
  /** @param {import("./session.js").Session} session */
  constructor(session, { fresh, opened, settings }) {
    this.session = session;
    this.opened = opened;
    this.found = null;
    this.search = h("input", { type: "search", class: "search-field", "aria-label": "Search chats", placeholder: "Search", oninput: () => this.look() });
    this.list = h("ul", { class: "chats" });
    this.note = h("p", { class: "quiet sidebar-note" });
    this.element = h(
      "nav",
      { class: "sidebar", id: "sidebar", "aria-label": "Chats" },
      h(
        "div",
        { class: "brand" },
        h("img", { src: "/page/seal.svg", alt: "", width: "26", height: "26" }),
        h("span", {}, "Lacre"),
        iconButton("close", "Close the list", () => this.toggle(false), { class: "icon-button drawer-close" }),
      ),
      h("button", { type: "button", class: "button wide-button", onclick: () => fresh() }, icon("plus"), "New chat"),
      h("label", { class: "search" }, icon("search"), this.search),
      this.list,
      h("div", { class: "sidebar-foot" }, this.note, h("button", { type: "button", class: "button quiet-button", onclick: () => settings() }, icon("settings"), "Settings")),
    );
    this.shade = h("div", { class: "shade", onclick: () => this.toggle(false) });
  }

  toggle(open = !document.body.classList.contains("drawer")) {
    document.body.classList.toggle("drawer", open);
    if (open) this.search.focus();
  }

  draw() {
    const heads = this.found ?? this.session.heads;
    const empty = this.found ? "Nothing found." : "Your chats appear here.";
    this.list.replaceChildren(...(heads.length ? heads.map((head) => this.item(head)) : [h("li", { class: "quiet empty" }, empty)]));
    this.note.textContent = remark(this.session.state.history);
  }

  item(head) {
    const current = head.id === this.session.chat.id;
    const arriving = this.session.arriving?.chat.id === head.id;
    return h(
      "li",
      { class: current ? "chat-item current" : "chat-item" },
      h(
        "button",
        { type: "button", class: "chat-open", "aria-current": current ? "true" : undefined, onclick: () => [this.toggle(false), this.opened(head.id)] },
        h("span", { class: "chat-title" }, head.title),
        head.around && h("span", { class: "chat-around" }, head.around),
        arriving && h("span", { class: "hidden-text" }, " (an answer arrives)"),
      ),
      iconButton("trash", `Delete ${head.title}`, () => this.remove(head), { class: "icon-button small" }),
    );
  }

  async remove(head) {
    const kept = this.session.state.history.state === "open" ? " It is deleted from the encrypted history too." : "";
    if (await confirmed("Delete this chat?", `“${head.title}” cannot be restored.${kept}`, "Delete")) {
      await this.session.forgetChat(head.id).catch((error) => this.session.tell("trouble", { error }));
      this.look();
    }
  }

  look() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.searched(this.search.value), SEARCH_AFTER);
  }

  async searched(words) {
    try {
      this.found = words.trim() ? (await asked("search", { method: "POST", content: { words } })).chats : null;
    } catch (error) {
      this.session.tell("trouble", { error });
    }
    if (this.search.value === words) this.draw();
  }
}

/** Where chats are kept, in a sentence. */
export function remark(history) {
  if (history.state === "open") return "Chats are kept on this computer, encrypted.";
  if (history.state === "locked") return "The history is locked. Open it in Settings.";
  return "Chats end with the proxy. Nothing is on disk.";
}
