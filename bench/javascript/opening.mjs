/**
 * How many records of one sealed answer the npm package opens and decodes in a second, each as it comes from a network.
 *
 * `from`: imports a module of the package, by its path in `src`. Runs in browsers too.
 */

/** @param {(path: string) => Promise<any>} from @param {{ enc: string, secret: string, aead: number, pieces: string[] }} answer in base64 */
export async function prepared(from, { enc, secret, aead, pieces }) {
  const { ResponseReader } = await from("wire/bhttp.js");
  const { AEADS } = await from("wire/keys.js");
  const { ResponseOpener } = await from("wire/ohttp.js");
  const bytes = (text) => Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
  const all = pieces.map(bytes);
  return async () => {
    const opener = new ResponseOpener(AEADS.get(aead), bytes(enc), bytes(secret));
    const reader = new ResponseReader();
    let contents = 0;
    const began = performance.now();
    for (const piece of all) {
      for await (const record of opener.push(piece)) for (const { kind } of reader.push(record)) contents += kind === "content";
    }
    for await (const record of opener.end()) reader.push(record).next();
    const seconds = (performance.now() - began) / 1000;
    return { contents, rate: contents / seconds };
  };
}
