/** Everything that can go wrong, as types that a caller can tell apart. Each message ends with what to do. */

/** The base of all errors of this package. `remedy` says what to do. */
export class LacreError extends Error {
  static remedy = "";

  /** @param {string} message what is wrong @param {{ cause?: unknown, remedy?: string }} [options] */
  constructor(message, { cause, remedy } = {}) {
    const todo = remedy ?? new.target.remedy;
    super(todo ? `${message}. ${todo}` : message, cause === undefined ? undefined : { cause });
    this.name = new.target.name;
    this.remedy = todo;
  }
}

/** The connection string, the token, an option or the store of manifests is not usable. */
export class ConfigurationError extends LacreError {
  static remedy = "Correct the option that the message names.";
}

/** The manifest does not verify, or is not a manifest. */
export class TrustError extends LacreError {
  static remedy = "Compare the connection string with the operator's. If it is right, the gateway is not the one that it names.";
}

/** The chain of roots does not lead from the pinned root to the signer. */
export class UntrustedRootError extends TrustError {}

/** It is in a later version of its format than this package reads. */
export class NewerFormatError extends TrustError {
  static remedy = "Update the package `lacre`.";
}

/** What was signed is no longer valid, or not yet. */
export class ExpiredError extends TrustError {
  static remedy = "Check this machine's clock. If it is right, the operator must run `lacre manifest publish`.";
}

/** The gateway serves an older manifest than one seen before, or another one of the same version. */
export class RollbackError extends TrustError {
  static remedy = "Ask the operator which manifest is the newest: someone may be using a replaced key.";
}

/** The manifest verifies, but offers no key, pool, model or shape that this client may use. */
export class NoUsableKeyError extends LacreError {
  static remedy = "Choose another pool or model, or ask the operator.";
}

/** An object that works once was used again, or after it failed. */
export class UsedError extends LacreError {
  static remedy = "Make a new request.";
}

/** No answer came, or its connection broke before it began. */
export class NetworkError extends LacreError {
  static remedy = "Check the address and the network. In a browser, the gateway's `listen.origins` must name the page's origin.";
}

/** An answer that is not of this protocol. */
export class ProtocolError extends LacreError {
  static remedy = "Check the address: another program may answer there.";
}

/** What the gateway says when it refuses. Nobody signs it (docs/wire.md section 13): it says what to try, not what to trust. */
export class ProblemError extends LacreError {
  static remedy = "";

  /**
   * @param {{ type: string, status: number, title: string, retryAfter: number | null, requestId: string | null, details: object }} said
   */
  constructor(said) {
    super(`the gateway refused the request: ${said.status} ${said.title || said.type}`, { remedy: remedyOf(said) });
    this.type = said.type;
    this.status = said.status;
    this.title = said.title;
    this.retryAfter = said.retryAfter;
    this.requestId = said.requestId;
    this.details = said.details;
  }
}

/** @param {{ status: number, retryAfter: number | null }} said */
function remedyOf({ status, retryAfter }) {
  if (retryAfter !== null) return `Try again in ${retryAfter} s.`;
  if (status === 401) return "Get a fresh token for this gateway.";
  if (status === 403) return "Ask the operator what the policy allows you.";
  if (status >= 500) return "Try again later, or tell the operator.";
  return "Change the request as the title says.";
}

/** A sealed message is wrong. */
export class MessageError extends LacreError {
  static remedy = "Ask again. If that fails too, tell the operator: a program between may alter answers.";
}

/** The message ended before its end. `cut`: its connection broke, so no worker need have been lost. */
export class TruncatedError extends MessageError {
  static remedy = "What came is not the whole answer: ask again.";
  cut = false;
}

/** A chunk does not open: it was changed, is out of place or belongs to another message. */
export class AlteredError extends MessageError {}

/** It opened, or is not sealed at all, and does not follow its format. */
export class MalformedError extends MessageError {}

/** It announces more than docs/wire.md section 15 allows. */
export class TooLargeError extends MessageError {
  static remedy = "Send less, or ask for less.";
}

/** An answer broke after a part of it was passed on, and could not be resumed. `tokens`: so many of it were received. */
export class StreamBrokenError extends LacreError {
  static remedy = "What came is not the whole answer: ask again.";
  tokens = 0;
}

/** The gateway did not prove that it recorded the request as it was sent. */
export class InvalidAuditError extends LacreError {
  static remedy = "Check whether a proxy drops the header Lacre-Audit. If none does, tell the gateway's operator.";
}

/** The worker's receipt is missing, or is not one for this answer. */
export class InvalidReceiptError extends LacreError {
  static remedy = "Tell the pool's operator.";
}

/** Another model file ran than the manifest or the caller's pin names. */
export class WrongModelError extends LacreError {
  static remedy = "Tell the pool's operator, or correct `pinModels`.";
}
