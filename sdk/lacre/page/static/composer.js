/**
 * Where a person writes: text, files, send and stop. The draft belongs to the chat and is kept with it.
 */

import { h, iconButton, toast } from "./dom.js";
import { fileCard } from "./message.js";
import { path } from "./tree.js";

const MAX_TEXT = 1024 * 1024; // bytes of a text file
const MAX_IMAGE = 4 * 1024 * 1024; // bytes
const MAX_FILES = 8;
const IMAGES = new Set(["image/png", "image/jpeg", "image/webp", "image/gif"]);

export class Composer {
  /** @param {import("./session.js").Session} session @param {(text: string, files: any[]) => void} send */
  constructor(session, send) {
    this.session = session;
    this.submit = send;
    this.area = h("textarea", {
      class: "ask", rows: "1", "aria-label": "Message", placeholder: "Write a message", enterkeyhint: "send",
      oninput: () => [this.grow(), this.draft()], onkeydown: (event) => this.key(event), onpaste: (event) => this.pasted(event),
    });
    this.picker = h("input", { type: "file", multiple: true, class: "hidden-input", tabindex: "-1", "aria-label": "Attach files", onchange: () => this.picked() });
    this.files = h("div", { class: "files" });
    this.clip = iconButton("clip", "Attach a text file or an image", () => this.picker.click());
    this.button = iconButton("send", "Send", () => this.go(), { class: "icon-button send" });
    this.stop = iconButton("stop", "Stop (Esc)", () => session.stop(), { class: "icon-button send stop" });
    this.element = h(
      "form",
      { class: "composer", onsubmit: (event) => event.preventDefault(), ondragover: (event) => event.preventDefault(), ondrop: (event) => this.dropped(event) },
      this.files,
      h("div", { class: "composer-row" }, this.clip, this.picker, this.area, this.stop, this.button),
    );
  }

  /** Not on a phone: its keyboard would cover the chat. */
  focus() {
    if (matchMedia("(pointer: fine)").matches) this.area.focus();
  }

  /** Shows the draft of the chat that is open now. */
  show() {
    this.area.value = this.session.chat.draft.text;
    this.drawFiles();
    this.grow();
    this.busy();
  }

  busy() {
    const arriving = this.session.arriving !== null;
    const focused = document.activeElement === this.button || document.activeElement === this.stop;
    this.button.hidden = arriving;
    this.stop.hidden = !arriving;
    if (focused) (arriving ? this.stop : this.area).focus();
    this.ready();
  }

  ready() {
    const { draft } = this.session.chat;
    this.button.disabled = !draft.text.trim() && draft.files.length === 0;
  }

  grow() {
    this.area.style.height = "auto";
    this.area.style.height = `${Math.min(this.area.scrollHeight, Math.max(160, window.innerHeight * 0.4))}px`;
  }

  draft() {
    this.session.chat.draft.text = this.area.value;
    this.ready();
    this.session.changed();
  }

  key(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.go();
    }
    if (event.key === "ArrowUp" && this.area.value === "" && !event.shiftKey) {
      const last = path(this.session.chat).findLast((node) => node.role === "user");
      if (last) [event.preventDefault(), this.session.tell("edit", { node: last })];
    }
  }

  go() {
    const { draft } = this.session.chat;
    if (this.session.arriving || (!draft.text.trim() && draft.files.length === 0)) return;
    this.session.chat.draft = { text: "", files: [] };
    this.submit(draft.text, draft.files);
    this.show();
  }

  // Files

  async picked() {
    await this.attach([...this.picker.files]);
    this.picker.value = "";
  }

  pasted(event) {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length > 0) [event.preventDefault(), this.attach(files)];
  }

  dropped(event) {
    event.preventDefault();
    this.attach([...(event.dataTransfer?.files ?? [])]);
  }

  async attach(files) {
    const { chat } = this.session;
    for (const file of files) {
      if (chat.draft.files.length >= MAX_FILES) {
        toast(`A message takes ${MAX_FILES} files.`, "error");
        break;
      }
      try {
        chat.draft.files.push(await read(file));
      } catch (error) {
        toast(error.message, "error");
      }
    }
    this.drawFiles();
    this.ready();
    this.session.changed();
    this.focus();
  }

  drawFiles() {
    const { draft } = this.session.chat;
    const remove = (file) => () => {
      draft.files = draft.files.filter((each) => each !== file);
      [this.drawFiles(), this.ready(), this.session.changed(), this.focus()];
    };
    this.files.replaceChildren(...draft.files.map((file) => fileCard(file, remove(file))));
    this.files.hidden = draft.files.length === 0;
  }
}

/** A file as a chat keeps it. Raises Error, which says why it is not taken. */
async function read(file) {
  const name = file.name.slice(0, 200) || "file";
  if (IMAGES.has(file.type)) {
    if (file.size > MAX_IMAGE) throw new Error(`${name} is larger than 4 MB. Attach a smaller picture.`);
    return { name, kind: "image", data: await asDataUrl(file) };
  }
  if (file.size > MAX_TEXT) throw new Error(`${name} is larger than 1 MB. Attach a part of it.`);
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (text.includes("\0")) throw new TypeError();
    return { name, kind: "text", data: text };
  } catch {
    throw new Error(`${name} is neither text in UTF-8 nor a picture (PNG, JPEG, WebP, GIF).`);
  }
}

function asDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}
