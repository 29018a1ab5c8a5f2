/**
 * The chats of this window: loads and keeps them, asks, stops, edits and branches. The views listen to its events.
 *
 * Nothing typed is lost: a chat is kept in the proxy's memory with its draft, also while an answer arrives. What cannot be kept
 * stays in this window, and the page warns before it closes.
 */

import { answer, asked, Failure } from "./api.js";
import * as tree from "./tree.js";

const KEEP_AFTER = 400; // ms after a change
const KEEP_WHILE_ARRIVING = 1500; // ms
const SETTINGS = "lacre-page-settings"; // names of models and numbers, no text of a chat

export class Session extends EventTarget {
  constructor() {
    super();
    this.heads = [];
    this.chat = tree.newChat(this.defaults());
    this.state = { models: [], verification: null, history: { state: "off" }, limits: {}, pinned: {}, priced: false, error: null };
    this.arriving = null; // { chat, node, abort, blocks }
    this.newest = null; // the checks of the newest answer
    this.rendered = new Map(); // node id -> blocks
    this.unkept = new Set(); // ids of chats with changes that the proxy does not have
    this.revisions = new Map();
    this.chats = new Map();
    this.timers = new Map();
    this.writing = new Map();
  }

  tell(kind, detail = {}) {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }

  defaults() {
    try {
      const told = JSON.parse(localStorage.getItem(SETTINGS) ?? "{}");
      return { model: typeof told.model === "string" ? told.model : "", params: told.params && typeof told.params === "object" ? told.params : {} };
    } catch {
      return {};
    }
  }

  async begin() {
    await this.list();
    // A gateway that is away takes a while to give up on, and the chats are here.
    const looked = this.look().catch((error) => this.tell("trouble", { error }));
    if (this.state.history.state === "locked" && this.state.history.kind === "keyring") {
      await this.openHistory({ kind: "open" }).catch((error) => this.tell("trouble", { error }));
    }
    if (this.heads.length > 0) await this.show(this.heads[0].id);
    else this.tell("chat");
    await looked;
  }

  /** What the proxy knows and has verified. */
  async look() {
    this.state = { ...(await asked("state")), history: this.state.history };
    this.tell("state");
  }

  async list() {
    const told = await asked("chats");
    this.heads = told.chats;
    this.state.history = told.history;
    for (const head of told.chats) if (!this.unkept.has(head.id)) this.revisions.set(head.id, head.revision);
    this.tell("list");
  }

  /** Goes to another chat. */
  async show(id) {
    if (!this.chats.has(id)) this.chats.set(id, tree.checked(await asked(`chats/${id}`)));
    this.chat = this.chats.get(id);
    await this.render();
    this.tell("chat");
  }

  begun() {
    this.chat = tree.newChat(this.defaults());
    this.tell("chat");
  }

  /** Renders the answers of the shown path that were not rendered yet. */
  async render() {
    const wanted = tree.path(this.chat).filter((node) => node.role === "assistant" && node.text && !this.rendered.has(node.id));
    for (let i = 0; i < wanted.length; i += 100) {
      const some = wanted.slice(i, i + 100);
      const texts = some.map((node) => ({ text: node.text, seams: node.seams ?? [] }));
      const { rendered } = await asked("render", { method: "POST", content: { texts } });
      some.forEach((node, n) => this.rendered.set(node.id, rendered[n]));
    }
  }

  // Keeping

  /** The chat has changed: the proxy gets it soon. */
  changed(chat = this.chat, after = KEEP_AFTER) {
    if (Object.keys(chat.nodes).length === 0 && !chat.draft.text && chat.draft.files.length === 0 && !this.chats.has(chat.id)) return;
    this.chats.set(chat.id, chat);
    this.unkept.add(chat.id);
    if (this.timers.has(chat.id)) return;
    this.timers.set(chat.id, setTimeout(() => this.keep(chat), after));
  }

  /** Writes a chat now. One write of a chat at a time. */
  async keep(chat = this.chat) {
    clearTimeout(this.timers.get(chat.id));
    this.timers.delete(chat.id);
    await this.writing.get(chat.id);
    if (!this.unkept.has(chat.id)) return;
    const write = this.write(chat).finally(() => this.writing.delete(chat.id));
    this.writing.set(chat.id, write);
    await write;
  }

  async write(chat) {
    this.unkept.delete(chat.id);
    const revision = this.revisions.get(chat.id) ?? 0;
    try {
      const told = await asked(`chats/${chat.id}`, { method: "PUT", body: JSON.stringify(chat), revision });
      this.revisions.set(chat.id, told.revision);
      this.note(chat, told.revision);
    } catch (error) {
      if (error.code === "stale") return this.copied(chat);
      this.unkept.add(chat.id);
      this.tell("trouble", { error, unkept: true });
    }
  }

  /** Another window has changed the same chat: both versions stay. */
  async copied(chat) {
    const old = chat.id;
    this.chats.delete(old);
    this.revisions.delete(old);
    Object.assign(chat, { id: tree.newId(), title: `${chat.title} (this window)`, named: true });
    this.chats.set(chat.id, chat);
    this.unkept.add(chat.id);
    await this.write(chat);
    await this.list();
    this.tell("trouble", { error: new Failure({ message: "Another window changed this chat. This window's version is a chat of its own now." }) });
  }

  note(chat, revision) {
    const head = { id: chat.id, title: chat.title, updated: chat.updated, revision };
    this.heads = [head, ...this.heads.filter((each) => each.id !== chat.id)].sort((one, other) => other.updated - one.updated);
    this.tell("list");
  }

  async forgetChat(id) {
    if (this.arriving?.chat.id === id) this.stop();
    await this.writing.get(id);
    clearTimeout(this.timers.get(id));
    await asked(`chats/${id}`, { method: "DELETE" });
    for (const kept of [this.timers, this.chats, this.revisions]) kept.delete(id);
    this.unkept.delete(id);
    await this.list();
    if (this.chat.id === id) this.begun();
  }

  // Asking

  /** Adds a question below a node and asks. parent: "" for the first one. */
  async send(text, files, parent = tree.path(this.chat).at(-1)?.id ?? "") {
    if (this.arriving) return;
    const node = tree.add(this.chat, parent, { role: "user", text, files });
    await this.reply(node);
  }

  /** Asks for another answer to a question. */
  async reply(question) {
    if (this.arriving) return;
    const chat = this.chat;
    const messages = tree.messages(chat, question.id);
    const node = tree.add(chat, question.id, { role: "assistant", state: "stopped", thought: "", seams: [], model: chat.model, facts: null, error: null });
    const arriving = { chat, node, abort: new AbortController(), blocks: [], tail: "" };
    this.arriving = arriving;
    this.tell("chat", { arriving: true });
    this.changed(chat);
    try {
      const question = { messages, model: chat.model || null, params: tree.params(chat) };
      let ended = false;
      for await (const line of answer(question, arriving.abort.signal)) {
        ended = this.take(arriving, line) || ended;
        this.changed(chat, KEEP_WHILE_ARRIVING);
      }
      if (!ended) throw new Failure({ code: "cut", message: "The answer broke off between the proxy and this page.", remedy: "Ask again." });
    } catch (error) {
      if (error.name !== "AbortError") this.failed(node, error);
    }
    this.arriving = null;
    await this.settle(chat, node, arriving);
  }

  /** Takes one line. Returns whether it was the last one. */
  take(arriving, line) {
    const { node } = arriving;
    if (line.t === "text") [node.text, arriving.tail] = [node.text + line.d, arriving.tail + line.d];
    else if (line.t === "thought") node.thought += line.d;
    else if (line.t === "seam") node.seams.push(line.at);
    else if (line.t === "blocks") {
      arriving.blocks.splice(line.from, Infinity, ...line.blocks);
      arriving.tail = "";
    } else if (line.t === "fail") this.failed(node, new Failure(line.error));
    else if (line.t === "end") {
      const { t: _kind, ...facts } = line;
      Object.assign(node, { state: "done", facts, model: line.model || node.model });
      this.newest = facts;
    }
    this.tell("piece", { arriving, line });
    return line.t === "end" || line.t === "fail";
  }

  failed(node, error) {
    node.state = "failed";
    node.error = error instanceof Failure ? error.members() : { message: `The page failed: ${error.message}`, remedy: "Reload the page; the chat stays." };
  }

  async settle(chat, node, arriving) {
    // A stopped answer was not rendered as a whole: it is, as the rest of a chat is.
    if (node.state === "stopped") this.rendered.delete(node.id);
    else this.rendered.set(node.id, arriving.blocks);
    tree.touch(chat);
    this.changed(chat);
    await this.keep(chat);
    if (node.state === "done" && this.state.models.length === 0) await this.look().catch(() => undefined); // the gateway is back
    await this.render().catch((error) => this.tell("trouble", { error }));
    this.tell("settled", { chat, node });
    if (this.chat === chat) this.tell("chat", { settled: node });
  }

  stop() {
    this.arriving?.abort.abort();
  }

  async choose(node) {
    tree.choose(this.chat, node);
    this.changed();
    await this.render();
    this.tell("chat", { kept: true });
  }

  // Settings of a chat, history, export

  set(members) {
    Object.assign(this.chat, members);
    localStorage.setItem(SETTINGS, JSON.stringify({ model: this.chat.model, params: this.chat.params }));
    this.changed();
    this.tell("settings");
  }

  rename(title) {
    Object.assign(this.chat, { title: title.trim().slice(0, 200) || this.chat.title, named: true });
    this.changed();
    this.tell("settings");
  }

  async openHistory(content) {
    this.state.history = await asked("history", { method: "POST", content });
    await this.list();
    this.tell("state");
  }

  /** Deletes every chat, on disk too. */
  async forget() {
    this.stop();
    for (const timer of this.timers.values()) clearTimeout(timer);
    await Promise.all(this.writing.values());
    this.state.history = await asked("history", { method: "DELETE" });
    for (const kept of [this.timers, this.chats, this.revisions, this.rendered, this.unkept]) kept.clear();
    await this.list();
    this.begun();
  }

  async export(all) {
    if (!all) return tree.exported([this.chat]);
    const chats = [];
    for (const head of this.heads) chats.push(this.chats.get(head.id) ?? tree.checked(await asked(`chats/${head.id}`)));
    return tree.exported(chats);
  }

  async import(text) {
    const chats = tree.imported(text);
    for (const chat of chats) {
      this.changed(chat);
      await this.keep(chat);
    }
    if (chats.length > 0) await this.show(chats[0].id);
    return chats.length;
  }
}
