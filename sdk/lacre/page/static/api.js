/**
 * Asks the proxy. Every request carries the session's half, which only this origin's storage has; the browser adds the cookie.
 */

const API = "/page/api/";
const HALF = "lacre-page-half";

/** What went wrong, what helps, and what was checked by then. */
export class Failure extends Error {
  /** @param {{ message: string, remedy?: string, code?: string, request_id?: string | null, verification?: any }} told */
  constructor(told, status = 0) {
    super(bare(told.message, told.remedy ?? ""));
    this.name = "Failure";
    this.status = status;
    this.code = told.code ?? "failed";
    this.remedy = told.remedy ?? "";
    this.requestId = told.request_id ?? null;
    this.verification = told.verification ?? null;
  }

  /** As a chat keeps it. */
  members() {
    return { message: this.message, remedy: this.remedy, code: this.code, request_id: this.requestId, verification: this.verification };
  }
}

/** The message without the remedy, which the proxy's messages end with: the page shows it apart. */
function bare(message, remedy) {
  const end = remedy.replace(/\.$/, "");
  return end && message.includes(end) ? message.replace(end, "").replace(/[\s.]*$/, ".") : message;
}

const away = () =>
  new Failure({
    code: "proxy_away",
    message: "The proxy on this computer does not answer. What you typed is still here.",
    remedy: "Start `lacre proxy --open` again, then open its new link.",
  });

/** Fetches the session's half, once after the link was opened. */
export async function claim() {
  if (localStorage.getItem(HALF) !== null && (await known())) return;
  localStorage.setItem(HALF, (await asked("claim", { method: "POST", content: {} })).half);
}

async function known() {
  try {
    await asked("chats");
    return true;
  } catch (error) {
    if (error.status === 401) return false;
    throw error;
  }
}

/** @param {string} path @param {{ method?: string, content?: any, body?: string, revision?: number, signal?: AbortSignal }} options */
async function sent(path, { method = "GET", content, body, revision, signal } = {}) {
  const headers = { "lacre-page": localStorage.getItem(HALF) ?? "" };
  const sealed = body ?? (content === undefined ? undefined : JSON.stringify(content));
  if (sealed !== undefined) headers["content-type"] = "application/json";
  if (revision !== undefined) headers["lacre-revision"] = String(revision);
  let response;
  try {
    response = await fetch(API + path, { method, headers, body: sealed, signal, credentials: "same-origin", redirect: "error" });
  } catch (error) {
    throw error.name === "AbortError" ? error : away();
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new Failure(told.error ?? { message: `The proxy answered with ${response.status}.` }, response.status);
}

/** The JSON that the proxy answers. */
export async function asked(path, options) {
  return (await sent(path, options)).json();
}

/** The lines of an answer while it arrives. Raises Failure if the stream is cut. */
export async function* answer(question, signal) {
  const response = await sent("ask", { method: "POST", content: question, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop() ?? "";
      for (const line of lines) if (line) yield JSON.parse(line);
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : away();
  }
}
