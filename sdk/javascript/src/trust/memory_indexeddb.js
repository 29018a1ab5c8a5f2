/** Remembers manifests in the browser's IndexedDB: one record, replaced within one transaction. */

import { ConfigurationError } from "../errors.js";

const STORE = "manifests";
const RECORD = "seen";
const REMEDY = "Allow this page to store data, or pass `memory: new ProcessMemory()`.";

export class IndexedDbMemory {
  #name;
  /** @type {Promise<IDBDatabase> | null} */
  #database = null;

  /** @param {string} [name] of the database */
  constructor(name = "lacre") {
    this.#name = name;
  }

  /** @returns {Promise<{ generation: number, text: string | null }>} */
  async read() {
    const stored = await this.#within("readonly", (store, done) => {
      const request = store.get(RECORD);
      request.onsuccess = () => done(request.result);
    });
    return stored ?? { generation: 0, text: null };
  }

  /** @param {number} generation @param {string} text @returns {Promise<boolean>} */
  async replace(generation, text) {
    return this.#within("readwrite", (store, done) => {
      const request = store.get(RECORD);
      request.onsuccess = () => {
        const same = (request.result?.generation ?? 0) === generation;
        if (same) store.put({ generation: generation + 1, text }, RECORD);
        done(same);
      };
    });
  }

  /**
   * What `work` told, once the transaction is complete.
   * @param {IDBTransactionMode} mode @param {(store: IDBObjectStore, done: (told: any) => void) => void} work @returns {Promise<any>}
   */
  async #within(mode, work) {
    try {
      const database = await (this.#database ??= open(this.#name));
      return await new Promise((resolve, reject) => {
        /** @type {any} */
        let told;
        const transaction = database.transaction(STORE, mode);
        transaction.oncomplete = () => resolve(told);
        transaction.onabort = () => reject(transaction.error);
        work(transaction.objectStore(STORE), (each) => (told = each));
      });
    } catch (cause) {
      this.#database = null;
      throw new ConfigurationError("this page cannot remember manifests in IndexedDB", { cause, remedy: REMEDY });
    }
  }
}

/** @param {string} name @returns {Promise<IDBDatabase>} */
function open(name) {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(name, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE);
    request.onsuccess = () => {
      request.result.onversionchange = () => request.result.close();
      resolve(request.result);
    };
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another page holds an older version open"));
  });
}
