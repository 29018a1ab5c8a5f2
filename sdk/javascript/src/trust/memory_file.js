/**
 * Remembers manifests in a folder of this user, 0700, with files 0600. Only programs that have `node:fs` load this module.
 *
 * Each content is a file of its own, `seen.<generation>.json`. `link` makes it whole or not at all, and fails if another program
 * made this generation first.
 */

import { link, mkdir, open, readdir, readFile, stat, unlink } from "node:fs/promises";
import { homedir } from "node:os";
import { join } from "node:path";

import { ConfigurationError } from "../errors.js";
import { randomBytes, toHex } from "../wire/bytes.js";

const REMEDY = "Make it a folder of this user with free space, or pass `memory: new ProcessMemory()`.";
const MAX_FILE = 64 * 2 ** 20; // bytes
const UNFINISHED = /^\.[0-9a-f]{16}$/;
const LEFT = 3600 * 1000; // milliseconds: what was begun before that was left by a crash
const OTHERS = 0o077; // the bits of a mode that let others in

export class FileMemory {
  #folder;

  /** @param {string} folder */
  constructor(folder) {
    this.#folder = folder;
  }

  /** `lacre/manifests-js` in `$XDG_STATE_HOME`, or in `~/.local/state`. */
  static default() {
    return new FileMemory(join(process.env.XDG_STATE_HOME || join(homedir(), ".local", "state"), "lacre", "manifests-js"));
  }

  /** @returns {Promise<{ generation: number, text: string | null }>} */
  async read() {
    return this.#mapped(async () => {
      await this.#own();
      for (;;) {
        const generation = await this.#newest();
        if (generation === 0) return { generation, text: null };
        const path = this.#path(generation);
        try {
          if ((await stat(path)).size > MAX_FILE) throw new ConfigurationError(`${path} has over ${MAX_FILE} bytes`);
          return { generation, text: await readFile(path, "utf8") };
        } catch (error) {
          if (!isCode(error, "ENOENT")) throw error; // a newer one replaced it meanwhile
        }
      }
    });
  }

  /** @param {number} generation @param {string} text @returns {Promise<boolean>} */
  async replace(generation, text) {
    return this.#mapped(async () => {
      await this.#own();
      await this.#tidy();
      const written = join(this.#folder, `.${toHex(randomBytes(8))}`);
      try {
        await writeWhole(written, text);
        await link(written, this.#path(generation + 1));
      } catch (error) {
        if (isCode(error, "EEXIST")) return false;
        throw error;
      } finally {
        await removed(written);
      }
      // Who made a generation that was there before, and gone by now, finds a higher one here.
      if ((await this.#newest()) !== generation + 1) return false;
      for (const older of await this.#generations()) if (older <= generation) await removed(this.#path(older));
      return true;
    });
  }

  /** Makes the folder; one that was there is refused unless it is this user's alone. */
  async #own() {
    await mkdir(this.#folder, { recursive: true, mode: 0o700 });
    const { uid, mode } = await stat(this.#folder);
    const user = process.getuid?.(); // Windows has none
    if (user === undefined) return;
    if (uid !== user) {
      throw new ConfigurationError(`${this.#folder} belongs to the user ${uid}, and this program runs as ${user}`, { remedy: REMEDY });
    }
    if (mode & OTHERS) {
      const remedy = `Look who wrote into it, and run: chmod 700 '${this.#folder}'`;
      throw new ConfigurationError(`others may enter ${this.#folder} (mode ${(mode & 0o7777).toString(8)})`, { remedy });
    }
  }

  /** Removes the files that a crash left unfinished. */
  async #tidy() {
    for (const name of await readdir(this.#folder)) {
      const path = join(this.#folder, name);
      if (UNFINISHED.test(name) && Date.now() - (await begunAt(path)) > LEFT) await removed(path);
    }
  }

  /** @param {number} generation */
  #path(generation) {
    return join(this.#folder, `seen.${generation}.json`);
  }

  async #generations() {
    const names = await readdir(this.#folder);
    return names.map((name) => Number(/^seen\.([1-9][0-9]{0,14})\.json$/.exec(name)?.[1] ?? 0)).filter((number) => number > 0);
  }

  async #newest() {
    return Math.max(0, ...(await this.#generations()));
  }

  /** @template T @param {() => Promise<T>} work @returns {Promise<T>} */
  async #mapped(work) {
    try {
      return await work();
    } catch (cause) {
      if (cause instanceof ConfigurationError) throw cause;
      throw new ConfigurationError(`the newest manifest cannot be remembered in ${this.#folder}`, { cause, remedy: REMEDY });
    }
  }
}

/** @param {unknown} error @param {string} code */
const isCode = (error, code) => error instanceof Error && /** @type {any} */ (error).code === code;

/** @param {string} path @param {string} text */
async function writeWhole(path, text) {
  const file = await open(path, "wx", 0o600);
  try {
    await file.writeFile(text);
    await file.sync();
  } finally {
    await file.close();
  }
}

/** When the file was written, in milliseconds; never if it is gone. @param {string} path */
async function begunAt(path) {
  try {
    return (await stat(path)).mtimeMs;
  } catch (error) {
    if (isCode(error, "ENOENT")) return Infinity;
    throw error;
  }
}

/** @param {string} path */
async function removed(path) {
  try {
    await unlink(path);
  } catch (error) {
    if (!isCode(error, "ENOENT")) throw error;
  }
}
