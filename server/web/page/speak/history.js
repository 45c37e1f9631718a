// What this browser keeps in IndexedDB: speeches that were heard, and previews of voices; both within bounds.

import { Shared } from "../ui.js";

const MOST_SPEECHES = 50;
const MOST_BYTES = 100 * 1024 * 1024;
const MOST_PREVIEWS = 200;

let opening = null;

function open() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("speech", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("speeches", { keyPath: "id", autoIncrement: true });
      request.result.createObjectStore("previews", { keyPath: "key" }).createIndex("at", "at");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opening;
}

/** Run `action` on a store; the result of the request that it returns. A browser without storage gives undefined. */
async function on(store, mode, action) {
  try {
    const database = await open();
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(store, mode);
      const request = action(transaction.objectStore(store));
      transaction.oncomplete = () => resolve(request?.result);
      transaction.onerror = () => reject(transaction.error);
      transaction.onabort = () => reject(transaction.error);
    });
  } catch {
    return undefined;
  }
}

/** The kept speeches, the newest first: {id, at, request, model, seconds, blob, rate}. */
export const speeches = new Shared([]);

export async function loadHistory() {
  const all = (await on("speeches", "readonly", (store) => store.getAll())) ?? [];
  speeches.value = all.reverse();
}

/** Keep a speech. The oldest ones leave where there are too many, or too large. */
export async function keepSpeech(speech) {
  if (speech.blob.size > MOST_BYTES) return;
  await on("speeches", "readwrite", (store) => store.add(speech));
  await loadHistory();
  let bytes = 0;
  const leaving = speeches.value.filter((each, i) => {
    bytes += each.blob.size;
    return i >= MOST_SPEECHES || bytes > MOST_BYTES;
  });
  for (const { id } of leaving) await forgetSpeech(id);
}

export async function forgetSpeech(id) {
  await on("speeches", "readwrite", (store) => store.delete(id));
  await loadHistory();
}

export async function clearHistory() {
  await on("speeches", "readwrite", (store) => store.clear());
  await loadHistory();
}

/** The kept preview with that key, or undefined. */
export async function cachedPreview(key) {
  return (await on("previews", "readonly", (store) => store.get(key)))?.blob;
}

export async function keepPreview(key, blob) {
  await on("previews", "readwrite", (store) => {
    store.put({ key, blob, at: Date.now() });
    const counting = store.count();
    counting.onsuccess = () => {
      let extra = counting.result - MOST_PREVIEWS;
      if (extra <= 0) return;
      store.index("at").openCursor().onsuccess = ({ target: { result: cursor } }) => {
        if (!cursor || extra <= 0) return;
        cursor.delete();
        extra -= 1;
        cursor.continue();
      };
    };
    return counting;
  });
}
