/** Everything that can go wrong, as types a caller can tell apart. */

export class LacreError extends Error {
  constructor(message, options) {
    super(message, options);
    this.name = new.target.name;
  }
}

/** The connection string, the token or an argument is not usable. */
export class ConfigurationError extends LacreError {}

/** The manifest does not verify, or is not what a manifest looks like. */
export class TrustError extends LacreError {}

/** The manifest verifies, but offers no key, pool, model or shape that this client may use. */
export class NoUsableKeyError extends LacreError {}

/** An object that works once was used again, or after it failed. */
export class UsedError extends LacreError {}

/** No response came, or one that is not of this protocol. */
export class TransportError extends LacreError {}

/** What the gateway says when it refuses. Nothing of it is authenticated (wire.md section 13). */
export class ProblemError extends LacreError {
  constructor(type, status, title, retryAfter) {
    super(`${status} ${type}${title ? `: ${title}` : ""}`);
    Object.assign(this, { type, status, title, retryAfter });
  }
}

/** A sealed message is wrong. */
export class MessageError extends LacreError {}

/** It ended before its end. */
export class TruncatedError extends MessageError {}

/** A chunk does not open: changed, out of place, or of another message. */
export class AlteredError extends MessageError {}

/** It opened, or is not sealed at all, and does not follow its format. */
export class MalformedError extends MessageError {}

/** It announces more than the limits of wire.md section 15 allow. */
export class TooLargeError extends MessageError {}

/** The API behind the seal answered with an error. */
export class ApiError extends LacreError {
  constructor(status, type, message) {
    super(`${status}: ${message}`);
    Object.assign(this, { status, type });
  }
}
